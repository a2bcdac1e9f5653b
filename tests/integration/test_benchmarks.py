"""The benchmarks run from end to end, on tiny sizes: a table, a row of numbers each, nothing left in results/."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# script → words of its table, and how many of its lines must carry finite numbers
QUICK = {
    "bench_aggregate.py": (["raw", "fp32", "int8", "int4", "gather_rank0", "refresh"], 7),
    "bench_clients.py": (["clients", "R²", "resident memory", "slots"], 3),
    "bench_memory.py": (["zero0", "zero3 x2", "4 clients", "int8 deltas"], 4),
    "bench_released_pattern.py": (["ours", "released", "alone"], 2),
    "bench_round.py": (["plain step", "stage 1 step", "stage1_over_plain", "federation_share"], 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", QUICK)
def test_quick(script: str) -> None:
    before = snapshot()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, script, "--quick"],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    words, least = QUICK[script]
    for word in words:
        assert word in done.stdout, f"{word} is not in\n{done.stdout}"
    assert sum(has_finite_number(line) for line in done.stdout.splitlines()) >= least, done.stdout
    assert snapshot() == before  # --quick measures nothing, so it records nothing


def has_finite_number(line: str) -> bool:
    for word in line.split()[1:]:
        try:
            if math.isfinite(float(word)):
                return True
        except ValueError:
            continue
    return False


def snapshot() -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (BENCHMARKS / "results").glob("*.csv")}
