"""Two ranks that meet on this host and add up: `python -m feddra_ds.doctor.selftest RANK PORT TIMEOUT`, run by `doctor`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

NUM_RANKS = 2
EXPECTED = 3.0  # 1 + 2


@dataclass(frozen=True)
class Outcome:
    """problem: why it failed, or None; seconds: how long it took, start-up of the interpreters included."""

    problem: str | None
    seconds: float


def run(timeout_s: float) -> Outcome:
    """Start the two ranks over gloo on this host and wait, at most `timeout_s` seconds, for their sum."""
    began = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launcher} | {"OMP_NUM_THREADS": "1"}
    problem: str | None = None
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(NUM_RANKS)]
        ranks = []
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "feddra_ds.doctor.selftest", str(rank), str(port), str(timeout_s)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
            stack.callback(_end, ranks[-1])
        while problem is None and any(process.poll() is None for process in ranks):
            if time.monotonic() - began > timeout_s:
                waiting = next(rank for rank, process in enumerate(ranks) if process.poll() is None)
                problem = f"rank {waiting} did not end within {timeout_s:g} s"
            problem = problem or _failure(ranks, logs)  # if one rank fails, the other waits for it: stop at once
            time.sleep(0.05)
        problem = problem or _failure(ranks, logs)
    return Outcome(problem, time.monotonic() - began)


def _failure(ranks: Sequence[subprocess.Popen[bytes]], logs: Sequence[IO[bytes]]) -> str | None:
    for rank, (process, log) in enumerate(zip(ranks, logs, strict=True)):
        if process.poll():
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
            return f"rank {rank} ended with {process.poll()}: {said[-1] if said else 'it said nothing'}"
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait(10)


def main(rank: int, port: int, timeout_s: float) -> None:
    """One rank: join the store, its slot and its peers as a run does, add the ranks up, and leave."""
    import torch

    from feddra_ds.distributed.launch import Launch
    from feddra_ds.distributed.plan import plan
    from feddra_ds.distributed.topology import Topology

    topology = Topology(
        plan(NUM_RANKS, NUM_RANKS, 1), Launch(rank, NUM_RANKS, rank, "127.0.0.1", port), torch.device("cpu"), timeout_s
    )
    value = torch.tensor([float(rank + 1)])
    assert topology.peers is not None
    topology.peers.allreduce([value]).wait()
    assert float(value) == EXPECTED, f"the sum over {NUM_RANKS} ranks is {float(value)}, not {EXPECTED}"
    topology.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
