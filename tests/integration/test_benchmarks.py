"""Every benchmark runs on tiny sizes, prints a table, and records nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from on_gpu import run_parts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.timeout(900)
LONG = (
    "bench_attacks", "bench_clients", "bench_goodput", "bench_loading", "bench_memory", "bench_objectives", "bench_plan",
    "bench_released_pattern",
)  # fmt: skip


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


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    left = "import subprocess, time; print('left', subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    commands = {
        "good": python("import tempfile; open(tempfile.mkstemp()[1], 'w').write('x')"),
        "bad": python("raise SystemExit(3)"),
        "stuck": python(left),
        "last": python(f"open({str(tmp_path / 'ran')!r}, 'w')"),
        "late": python(""),
    }
    limits = {"good": 60.0, "bad": 60.0, "stuck": 5.0, "last": 60.0, "late": 0.0}
    problems = run_parts(commands, limits, 600.0)
    assert problems == {
        "bad": "ended with 3",
        "stuck": "did not end within 5 s",
        "late": "not started: the 600 s for all parts were spent",
    }
    assert (tmp_path / "ran").exists()
    child = next(line.split()[1] for line in capfd.readouterr().out.splitlines() if line.startswith("left"))
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.exhaustive
@pytest.mark.timeout(6000)
def test_everything_that_needs_a_gpu_runs_dry() -> None:
    results = {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*")}
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [line.split()[1:] for line in done.stdout.splitlines()[-8:]] == [["ok"]] * 8
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*")} == results
