"""The Triton kernels under Triton's interpreter, on the CPU: parity with float64 on small shapes.

Triton decides at its own import whether it interprets, and by now another test may have imported it: the cases, in
losses_triton_cases.py, run in a process of their own. Speed and the compiler need a GPU: tests/gpu/test_triton_gpu.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run_cases(marker: str, timeout: float) -> int:
    """Run the cases of a marker under the interpreter; the number that passed. Any failure fails, with their output."""
    cases = Path(__file__).with_name("losses_triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", marker, str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    return int(found[1])


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    assert run_cases("not slow", 500) >= 30


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_the_kernels_in_the_interpreter_in_every_combination() -> None:
    assert run_cases("slow", 1400) == 30
