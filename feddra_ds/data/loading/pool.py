"""One decoder for all clients and splits of a process: a background thread, or worker processes.

Workers are fresh interpreters that know no torch, no process group and no CUDA (a fork of a training process would
inherit all three), and that end when their parent does. Every wait on them is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.connection as mpc
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import Future
from pathlib import Path

from feddra_ds.common.errors import DataError
from feddra_ds.data.loading.decode import Decoded, Source, Task


class DecodePool:
    """Decodes tasks in the order they were given; shared by every ClientData of a process.

    num_workers: 0 decodes in one background thread. prefetch: batches ahead per worker. timeout_s: the longest wait for
    one batch. Close it (or leave its `with`) to end the workers; they also end with the process.
    """

    def __init__(self, num_workers: int = 0, prefetch: int = 2, timeout_s: float = 300.0):
        self.num_workers, self.prefetch, self.timeout_s = num_workers, prefetch, timeout_s
        self._backend: _Thread | _Workers | None = None

    @property
    def depth(self) -> int:
        """Batches that a stream keeps in the making."""
        return self.prefetch * max(1, self.num_workers)

    def submit(self, source: Source, task: Task) -> Future[Decoded]:
        """Start a task. Raises DataError when a worker has died."""
        if self._backend is None:
            self._backend = _Workers(self.num_workers) if self.num_workers else _Thread()
            weakref.finalize(self, self._backend.close)
        return self._backend.submit(source, task)

    def wait(self, future: Future[Decoded], source: Source, task: Task) -> Decoded:
        """The task's arrays. Raises DataError after `timeout_s`, or when the worker died."""
        try:
            return future.result(self.timeout_s)
        except TimeoutError:
            raise DataError(f"client {source.name}: no batch within {self.timeout_s:.0f} s ({task}); "
                            "is the storage of data.root reachable?") from None  # fmt: skip

    def close(self) -> None:
        """End the thread or the workers; tasks under way are dropped."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Thread:
    """One daemon thread (a stuck read must not keep the process from ending) and its queue."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[tuple[Future[Decoded], Source, Task] | None] = queue.SimpleQueue()
        self.closed = False
        threading.Thread(target=self._run, name="feddra-decode", daemon=True).start()

    def submit(self, source: Source, task: Task) -> Future[Decoded]:
        future: Future[Decoded] = Future()
        self.tasks.put((future, source, task))
        return future

    def _run(self) -> None:
        while (item := self.tasks.get()) is not None:
            future, source, task = item
            if self.closed or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(source.decode(task))
            except BaseException as error:
                future.set_exception(error)
            del future, source, task, item

    def close(self) -> None:
        self.closed = True
        self.tasks.put(None)


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, number: int):
        ours, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH", "")) if p)
        # One thread each: the ranks and workers of a host share its cores.
        threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import worker_main; worker_main({theirs.fileno()})"],
                env={**os.environ, "PYTHONPATH": path, **threads},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.number = number
        self.connection = mpc.Connection(ours.detach())
        self.sources: set[int] = set()
        self.pending: dict[int, tuple[Future[Decoded], str]] = {}

    def obituary(self) -> str:
        try:
            code: int | None = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        doing = next((what for _, what in self.pending.values()), "idle")
        return (f"data worker {self.number} (process {self.process.pid}) died ({how}) while decoding {doing}; "
                "if memory ran out, lower data.num_workers or data.prefetch")  # fmt: skip


class _Workers:
    """Worker processes, and the thread that receives from all of them, so that none ever blocks on a full pipe."""

    def __init__(self, num_workers: int):
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.closed = False
        self.failure: str | None = None
        self.workers = [_Worker(number) for number in range(num_workers)]
        threading.Thread(target=self._receive, name="feddra-receive", daemon=True).start()

    def submit(self, source: Source, task: Task) -> Future[Decoded]:
        future: Future[Decoded] = Future()
        with self.lock:
            if self.failure is not None:
                raise DataError(self.failure)
            worker = min(self.workers, key=lambda w: (len(w.pending), w.number))
            number = next(self.numbers)
            worker.pending[number] = (future, f"client {source.name} {task}")
            with contextlib.suppress(OSError):  # where it has died, the receiving thread reports that
                if source.uid not in worker.sources:
                    worker.connection.send(("source", source.uid, source))
                    worker.sources.add(source.uid)
                    weakref.finalize(source, _forget, weakref.ref(worker), source.uid)
                worker.connection.send(("task", number, (source.uid, task)))
        return future

    def _receive(self) -> None:
        open_connections = {worker.connection: worker for worker in self.workers}
        while open_connections and not self.closed:
            for connection in mpc.wait(list(open_connections), timeout=1.0):
                worker = open_connections[connection]  # type: ignore[index]
                try:
                    number, ok, value = worker.connection.recv()
                except (EOFError, OSError):
                    del open_connections[worker.connection]
                    self._bury(worker)
                    continue
                with self.lock:
                    future, _ = worker.pending.pop(number)
                if future.set_running_or_notify_cancel():
                    if ok:
                        future.set_result(value)
                    else:
                        future.set_exception(value)

    def _bury(self, worker: _Worker) -> None:
        message = "the data workers were closed" if self.closed else worker.obituary()
        with self.lock:
            self.failure = self.failure or message
            pending, worker.pending = worker.pending, {}
        for future, _ in pending.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(DataError(message))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for worker in self.workers:
            worker.process.kill()  # it writes nothing, so it can be ended at any moment
        for worker in self.workers:
            worker.process.wait(10)
            self._bury(worker)


def _forget(worker: weakref.ref[_Worker], uid: int) -> None:
    alive = worker()
    if alive is not None:
        with contextlib.suppress(OSError, ValueError):
            alive.connection.send(("forget", uid, None))


def worker_main(descriptor: int) -> None:
    """A worker process: receives sources and tasks over the socket, sends arrays back, ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too, but the parent first finishes its step
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM sends it to all processes of a job
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    connection = mpc.Connection(descriptor)
    sources: dict[int, Source] = {}
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            kind, number, value = connection.recv()
            if kind == "source":
                sources[number] = value
            elif kind == "forget":
                sources.pop(number, None)
            else:
                connection.send((number, *_answer(sources[value[0]], value[1])))


def _answer(source: Source, task: Task) -> tuple[bool, Decoded | DataError]:
    try:
        return True, source.decode(task)
    except DataError as error:
        return False, DataError(error.problems)
    except Exception:
        return False, DataError(f"client {source.name} {task}: a data worker failed:\n{traceback.format_exc()}")
