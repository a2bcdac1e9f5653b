"""Run a function on N gloo ranks: `results = run_ranks(fn, world_size, *args)`.

`fn(rank, world_size, *args)` is a module-level function; it runs with the default process group initialised (gloo),
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, one thread, torch seeded with 0, and
its picklable result comes back. Ranks are kept in a pool, one per world size, and run case after case over one process
group. `init_group=False` is for a function that makes its own default group; it and `fresh=True` get processes of their
own, which end with the case. All are forked off a server that has imported torch and transformers, and nothing else done.

If a rank raises or dies, or the case takes longer than `timeout`, every rank is killed and `RankError` names the first
rank that failed with its traceback and the end of its output; the next case starts a new pool.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import math
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# all that a run imports but deepspeed, which looks at the rank's environment
MODELS = ["transformers.models.vit.modeling_vit", "transformers.models.bert.modeling_bert", "peft"]
PRELOADED = ["feddra_ds.run.build", *MODELS, "scipy.stats"]
GRACE_S = 2.0  # after the first failure: time for a rank that failed earlier, but reports later, to be heard
LOG_LINES = 40


class RankError(AssertionError):
    """A rank failed, died or did not finish. `rank` is the first one that did, `ranks` all of them."""

    def __init__(self, message: str, ranks: list[int]):
        super().__init__(message)
        self.ranks = ranks
        self.rank = ranks[0]


def free_port() -> int:
    """A TCP port of this host that nothing listens on, never the same twice.

    From below the range that the kernel takes ports of outgoing connections from: there another test's could take it.
    """
    kernels = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(kernels.read_text().split()[0]) if kernels.exists() else 32768
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(min(10240, end - 1024), end)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


_given: set[int] = set()


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init_group: bool = True,
    fresh: bool = False,
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on every rank; its results, by rank. Raises RankError (see the module)."""
    if fresh or not init_group:
        with RankPool(world_size, init_group=init_group) as own:
            return own.run(fn, *args, timeout=timeout)
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        pool = _pools[world_size] = RankPool(world_size)
    return pool.run(fn, *args, timeout=timeout)


class RankPool:
    """`world_size` processes that wait for functions to run; `run` runs one on all of them."""

    def __init__(self, world_size: int, init_group: bool = True):
        self.world_size = world_size
        self.alive = True
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._connections: list[Connection] = []
        self._processes = []
        port = free_port()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, port, init_group, str(self._log(rank)))
            )
            process.start()
            theirs.close()  # so that a dead rank reads as end of file here
            self._connections.append(ours)
            self._processes.append(process)
        atexit.register(self.close)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Results of `fn(rank, world_size, *args)` by rank. On any failure the pool is closed and RankError raised."""
        try:
            return self._run(fn, args, timeout)
        except BaseException:  # a time-out of the test too: answers that come later would be taken for the next case's
            self.close(kill=True)
            raise

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        request = pickle.dumps((fn, args, timeout))
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # a dead rank is seen below
                connection.send_bytes(request)
        results: dict[int, Any] = {}
        failures: dict[int, tuple[float, str]] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            pending = [r for r in range(self.world_size) if r not in results and r not in failures]
            ready = wait([self._connections[r] for r in pending], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (r for r in pending if self._connections[r] in ready):
                try:
                    ok, when, value = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(5)
                    # it cannot say when; what the others met came of it
                    ok, when, value = False, -math.inf, f"died with exit code {self._processes[rank].exitcode}"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = (when, value)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        if failures:
            ranks = sorted(failures, key=lambda r: failures[r][0])
            head = f"rank {ranks[0]} of {self.world_size} failed (failed: {sorted(ranks)}): {failures[ranks[0]][1]}"
        else:
            ranks = [r for r in range(self.world_size) if r not in results]
            head = f"ranks {ranks} of {self.world_size} did not finish {fn.__name__} within {timeout:g} s"
        raise RankError(f"{head}\n--- end of rank {ranks[0]}'s output ---\n{self._tail(ranks[0])}", ranks)

    def close(self, kill: bool = False) -> None:
        """End all ranks: by closing their pipes, or, with `kill` or when that takes more than 10 s, by force."""
        if not self.alive:
            return
        self.alive = False
        atexit.unregister(self.close)
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + 10
        for process in self._processes:
            if not kill:
                process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.log"

    def _tail(self, rank: int) -> str:
        log = self._log(rank)
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]) if log.exists() else ""


_pools: dict[int, RankPool] = {}


def _serve(connection: Connection, rank: int, world_size: int, port: int, init_group: bool, log: str) -> None:
    """A rank: initialise the group, then run what the pipe brings until it closes."""
    gc.freeze()  # else each run's collection goes through all that the server has imported
    file = open(log, "w", buffering=1)  # noqa: SIM115 (lives as long as the process)
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    # the server ends with the test's process
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    os.environ.update({k: str(v) for k, v in environment.items()})
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import numpy as np
    import torch

    random.seed()  # not as the server left them, alike on all ranks: that would hide a seed that a run forgets
    np.random.seed()
    torch.set_num_threads(1)
    error = ""
    if init_group:
        try:
            torch.distributed.init_process_group(
                "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
            )
        except Exception:
            error = "could not initialise the process group\n" + traceback.format_exc()
    saved = dict(os.environ)
    while True:
        try:
            fn, args, timeout = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        except Exception:  # the function cannot be imported here
            error, timeout = error or traceback.format_exc(), 1.0
        faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5), file=file)
        ok, value = False, error
        if not error:
            torch.manual_seed(0)
            try:
                ok, value = True, fn(rank, world_size, *args)
                pickle.dumps(value)
            except BaseException:
                ok, value = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        os.environ.clear()
        os.environ.update(saved)
        connection.send_bytes(pickle.dumps((ok, time.time(), value)))
    file.flush()
    os._exit(0)  # destroying a group whose peers are gone may wait for its timeout


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
