"""Every benchmark runs on tiny sizes, prints a table, and records nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.timeout(900)
LONG = ("bench_clients", "bench_loading", "bench_memory", "bench_plan", "bench_released_pattern")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, marks=pytest.mark.exhaustive if path.stem in LONG else pytest.mark.slow, id=path.stem)
        for path in sorted(BENCHMARKS.glob("bench_*.py"))
    ],
)
def test_it_runs(script: Path) -> None:
    results = {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 3, done.stdout
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*")} == results
