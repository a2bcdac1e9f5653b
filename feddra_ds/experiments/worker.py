"""A worker: a process that does one run after another, so that imports are paid once.

Jobs come as JSON lines on stdin, answers go as JSON lines to the stdout that it was started with. All that a run prints
goes to its log. When stdin ends, also in the middle of a run, so does the worker: nothing runs on after its parent.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from feddra_ds.common.files import write_atomic
from feddra_ds.experiments.spec import EvaluateSpec

LOG_NAME = "log.txt"


def main() -> None:
    """Do the jobs of stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    jobs: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while (line := jobs.get()) is not None:
        answers.write(json.dumps(do(json.loads(line))) + "\n")
        answers.flush()


def _listen(jobs: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # with what it has launched; the main thread may be deep in a training


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure: {status: ok, metrics, seconds, …} or {status: crashed, reason}. Never raises an Exception.

    job: tree (the whole config), launch (a launcher's command, or None), evaluate, keep.
    """
    run_dir = Path(job["tree"]["run"]["output_dir"])
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    began, cpu = time.monotonic(), time.process_time()
    log = os.open(run_dir / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        rounds = _train(job, run_dir)
        trained = time.monotonic()
        from feddra_ds.experiments.measure import measure

        metrics = measure(run_dir, EvaluateSpec(**job["evaluate"]), rounds)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".strip()
        return {"status": "crashed", "reason": reason[:2000], "seconds": round(time.monotonic() - began, 2)}
    finally:
        sys.stderr.flush()
    tidy(run_dir, job["keep"])
    seconds = {"train": trained - began, "evaluate": time.monotonic() - trained}
    return {
        "status": "ok",
        "metrics": metrics,
        "seconds": round(time.monotonic() - began, 2),
        # of the worker alone; on a busy machine far less than the clock's
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "rounds": len(rounds),
        "versions": versions(),
    }


def tidy(run_dir: Path, keep: str) -> None:
    """Delete what is heavy. keep: all (others will read it), or record (config, metrics, log)."""
    if keep == "record":
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        shutil.rmtree(run_dir / "model", ignore_errors=True)
        shutil.rmtree(run_dir / "events", ignore_errors=True)


def versions() -> dict[str, str]:
    """Of what computes."""
    from importlib.metadata import version

    import feddra_ds

    return {"feddra_ds": feddra_ds.__version__, **{name: version(name) for name in ("torch", "deepspeed")}}


def _train(job: dict[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    if not job["launch"]:
        from feddra_ds.run.train import train

        return train(job["tree"]).rounds
    from feddra_ds.run.metrics_file import read_metrics

    config = run_dir / "asked.yaml"
    write_atomic(config, json.dumps(job["tree"]))  # JSON is YAML
    command = [word.format(port=_free_port()) for word in shlex.split(job["launch"])]
    done = subprocess.run([*command, "--config", str(config)], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{job['launch']} ended with status {done.returncode}; see {run_dir / LOG_NAME}")
    return read_metrics(run_dir / "metrics.jsonl")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
