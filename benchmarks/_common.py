"""What the benchmarks share: interleaved timing, peak memory, and CSV rows that say where they come from."""

from __future__ import annotations

import csv
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def synchronize(device: str) -> None:
    """Wait for everything queued on `device`."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved_times(
    cases: Mapping[str, Callable[[], object]], device: str, repeats: int, warmup: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of each case, `repeats` times each, in turns: a slow moment of the machine meets all of them.

    CPU seconds are this process's, over all its threads: waiting for other processes does not enter them.
    """
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, run in cases.items():
            synchronize(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            synchronize(device)
            if turn >= warmup:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    return wall, cpu


def interleaved_seconds(
    cases: Mapping[str, Callable[[], object]], device: str, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each case, `repeats` times each, in turns."""
    return interleaved_times(cases, device, repeats, warmup)[0]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, first and last decile, by linear interpolation (of few values: nearly their extremes)."""
    if len(values) == 1:
        return dict.fromkeys(("p50", "p10", "p90"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p50": statistics.median(values), "p10": cuts[0], "p90": cuts[8]}


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the turns of value / reference, both from `interleaved_seconds`."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))


def peak_bytes_above_now(run: Callable[[], object], device: str) -> int:
    """Peak memory of `run` above what is held when it starts: the device's allocator, or this process's RSS (Linux).

    On a CPU call it in a fresh process: memory that was freed but not returned would hide what `run` takes.
    """
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present size
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: CPU memory is measured on Linux only")


def in_fresh_process(script: str, argument: Mapping[str, Any], timeout: float = 1800) -> Any:
    """`script --child JSON` run by this interpreter: what it printed last, parsed as JSON."""
    command = [sys.executable, script, "--child", json.dumps(argument)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache
def provenance(device: str) -> dict[str, str]:
    """Commit, date, device and versions, the last columns of every row."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "none"
    if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"):  # rows are no change
        commit += "-dirty"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "deepspeed", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"commit": commit, "date": date, "device": name, **versions}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def append_row(name: str, row: Mapping[str, Any], device: str) -> Path:
    """Add `row` and its provenance to results/<name>.csv; new columns are added to the rows already there, empty."""
    row = {**row, **provenance(device)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    columns = list(dict.fromkeys([*(old[0] if old else ()), *row]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, row])
    return path
