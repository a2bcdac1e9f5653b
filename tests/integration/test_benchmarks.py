"""Every benchmark runs on tiny sizes, prints a table, and records nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_it_runs(script: Path) -> None:
    results = {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 3, done.stdout
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*")} == results
