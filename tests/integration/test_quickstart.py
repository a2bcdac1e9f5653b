"""`make quickstart` as a newcomer types it, and what it has to show: better than chance by far, and a control that is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_learns_and_its_control_does_not(tmp_path: Path) -> None:
    environment = Path(sys.prefix)  # the one that runs this test
    ready = str(environment / ".installed")
    said = _run("make", "-o", ready, "quickstart", f"VENV={environment}", f"QUICKSTART={tmp_path}")
    for client in ("university_hospital", "lung_sanatorium", "island_hospital (held out, test)", "worst"):
        assert client in said
    assert len(re.findall(r"^  feddra-ds ", said.partition("Against chance")[2], re.M)) >= 3, "what to do next"
    report = tmp_path / "run" / "report.html"
    assert 20_000 < report.stat().st_size < 5_000_000

    options = (sys.executable, "-m", "feddra_ds", "evaluate", str(tmp_path / "run"), "--no-zero-shot", "--json")
    found = json.loads(_run(*options))
    pooled, held_out = found["pooled"], found["clients"]["island_hospital"]
    assert pooled["pairs"] >= 200
    for place, times in ((pooled, 5), (held_out, 3)):
        told = place["intervals"]["recall@5"]
        assert told["recall"] > times * told["chance"]
    control = json.loads(_run(*options, "--shuffled-texts"))["pooled"]["intervals"]["recall@5"]
    assert control["low"] <= control["chance"] <= control["high"]
