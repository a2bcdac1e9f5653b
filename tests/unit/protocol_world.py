"""A world for a run's agreement code: ranks as threads of which one runs at a time, a clock that jumps, a store that fails.

What waits (`time.sleep`, a thread's `join`, an event, a collective) hands over to whoever is next in the world's own time, so
that a schedule is a function of its seed, and hours pass in milliseconds.
"""

from __future__ import annotations

import heapq
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

MOST_EVENTS = 20_000  # of a schedule; the longest honest ones have some hundred


class Violation(AssertionError):
    """What must not happen has happened."""


class Killed(BaseException):
    """Of a process of the world, by the world."""


class Process:
    """A rank's process: its threads live, stop and die together."""

    def __init__(self, name: str):
        self.name, self.is_dead, self.frozen_until = name, False, 0.0
        self.tasks: list[Task] = []
        self.outcome: BaseException | None = None


class Task:
    """A thread of a process."""

    def __init__(self, process: Process, work: Callable[[], None], is_main: bool):
        self.process, self.work, self.is_main = process, work, is_main
        self.is_done, self.turn = False, 0  # turn: of its waits; an event of an older one is void
        self.waits_for: str | None = None
        self.missed: str | None = None  # the key that it has just looked for in vain
        self.worker: Worker | None = None


class Worker(threading.Thread):
    """A thread of the machine, used for one task after another."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gate = threading.Lock()
        self.gate.acquire()
        self.job: tuple[World, Task] | None = None
        self.start()

    def run(self) -> None:
        while True:
            self.gate.acquire()
            assert self.job is not None
            world, task = self.job
            world.live(task)


_idle: list[Worker] = []
_now: list[World] = []  # the world that runs


class World:
    """One schedule. `draw` is where all chance comes from."""

    def __init__(self, seed: int, nap: float, limit: float):
        """nap: the longest time between two looks of who polls; limit: by when all must have ended. In the world's seconds."""
        self.draw, self.nap, self.limit, self.now = random.Random(seed), nap, limit, 0.0
        self.current: Task | None = None
        self.violations: list[str] = []
        self._events: list[tuple[float, int, Any]] = []
        self._count = 0
        self._is_ending = False
        self._waiting: dict[str, list[Task]] = {}
        self._tasks: list[Task] = []
        self._over = threading.Lock()
        self._over.acquire()

    # ---- what the ranks do
    def start(self, process: Process, work: Callable[[], None], *, is_main: bool = False) -> Task:
        """A thread of a process, which runs when its time comes."""
        task = Task(process, work, is_main)
        process.tasks.append(task)
        self._tasks.append(task)
        self._wake(task, self.now)
        return task

    def wait(self, seconds: float, key: str | None = None) -> None:
        """Until so much time has passed, or until `tell(key)`."""
        task = self.current
        assert task is not None
        if task.process.is_dead:
            raise Killed
        task.waits_for = key
        if key is not None:
            self._waiting.setdefault(key, []).append(task)
        self._wake(task, self.now + seconds)
        self._hand_over(task)
        task.waits_for = None
        if task.process.is_dead:
            raise Killed

    def tell(self, key: str) -> None:
        """Wake who waits for a key."""
        for task in self._waiting.pop(key, ()):
            if task.waits_for == key and not task.is_done:
                self._wake(task, self.now)

    def sleep(self, seconds: float) -> None:
        """As time.sleep. Who has just looked for a key in vain sleeps until it is there, or for `nap`."""
        task = self.current
        assert task is not None
        key, task.missed = task.missed, None
        self.wait(seconds if key is None else max(seconds, self.nap), key)

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Something that happens to the world."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, action))

    def kill(self, process: Process) -> None:
        """As SIGKILL: its threads do nothing any more."""
        if process.is_dead:
            return
        process.is_dead, process.frozen_until = True, 0.0
        for task in process.tasks:
            if not task.is_done and task is not self.current:
                self._wake(task, self.now)
        self.tell(f"end of {process.name}")

    def stop(self, process: Process, seconds: float) -> None:
        """As SIGSTOP, and SIGCONT after a time."""
        process.frozen_until = self.now + seconds

    def run(self) -> None:
        """Until every process has ended. Raises Violation."""
        _now.append(self)
        try:
            first = self._next()
            if first is not None:
                self._go(first)
                self._over.acquire()
        finally:
            _now.pop()
        if self.violations:
            raise Violation(self.violations[0])

    # ---- whose turn it is
    def _wake(self, task: Task, when: float) -> None:
        task.turn += 1
        self._count += 1
        heapq.heappush(self._events, (when, self._count, (task, task.turn)))

    def _next(self) -> Task | None:
        """The task whose time has come; what happens before it has happened then."""
        while True:
            left = [task for task in self._tasks if not task.is_done]
            if not left:
                return None
            if (self.now > self.limit or self._count > MOST_EVENTS) and not self._is_ending:
                waits = ", ".join(f"{task.process.name} for {task.waits_for}" for task in left)
                self.violations.append(f"no end after {self.now:.0f} s and {self._count} events; who waits: {waits}")
                self._is_ending = True
                for task in left:
                    self.kill(task.process)
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            if not isinstance(what, tuple):
                what()
                continue
            task, turn = what
            if task.is_done or turn != task.turn:
                continue
            if task.process.frozen_until > self.now:
                self._wake(task, task.process.frozen_until)
                continue
            return task

    def _go(self, task: Task) -> None:
        self.current = task
        if task.worker is None:
            task.worker = _idle.pop() if _idle else Worker()
            task.worker.job = (self, task)
        task.worker.gate.release()

    def _hand_over(self, task: Task) -> None:
        self.current = None
        following = self._next()
        assert following is not None
        if following is task:
            self.current = task
            return
        worker = task.worker
        assert worker is not None
        self._go(following)
        worker.gate.acquire()

    def live(self, task: Task) -> None:
        """A task from its beginning to its end, in its worker."""
        try:
            if not task.process.is_dead:
                task.work()
        except Killed:
            pass
        except BaseException as error:
            if task.is_main:
                task.process.outcome = error
            else:
                self.violations.append(f"a thread of {task.process.name} ended with {error!r}")
        task.is_done = True
        if task.is_main:
            self.kill(task.process)
        self.tell(f"end of {id(task)}")
        self.current = None
        worker, following = task.worker, self._next()
        assert worker is not None
        _idle.append(worker)
        if following is None:
            self._over.release()
        else:
            self._go(following)


class Store:
    """A store as one process sees it. What is set may come late, twice or never; it ends with the process that serves it."""

    def __init__(self, world: World, values: dict[str, bytes], server: Process, faults: Faults):
        self.world, self.values, self.server, self.faults = world, values, server, faults

    def set(self, key: str, value: str) -> None:
        self._reach()
        draw = self.world.draw
        if draw.random() < self.faults.lost:
            return
        self._arrive(key, value, draw.expovariate(1 / self.faults.delay) if draw.random() < self.faults.late else 0.0)
        if draw.random() < self.faults.twice:
            self._arrive(key, value, draw.uniform(0, 8 * self.faults.delay))

    def _arrive(self, key: str, value: str, delay: float) -> None:
        def arrive() -> None:
            self.values[key] = value.encode()
            self.world.tell(f"{id(self.values)} {key}")

        if delay:
            self.world.at(self.world.now + delay, arrive)
        else:
            arrive()

    def check(self, keys: Sequence[str]) -> bool:
        self._reach()
        missing = [key for key in keys if key not in self.values]
        task = self.world.current
        assert task is not None
        task.missed = f"{id(self.values)} {missing[0]}" if missing else None
        return not missing

    def get(self, key: str) -> bytes:
        self._reach()
        return self.values[key]

    def delete_key(self, key: str) -> bool:
        self._reach()
        return self.values.pop(key, None) is not None

    def _reach(self) -> None:
        task = self.world.current
        assert task is not None
        if task.process.is_dead:
            raise Killed
        if self.server.is_dead:
            raise dist.DistNetworkError("Connection reset by peer")


class Faults:
    """What a schedule's store does to messages: shares of them, and a mean delay in seconds."""

    def __init__(self, late: float = 0.0, delay: float = 1.0, lost: float = 0.0, twice: float = 0.0):
        self.late, self.delay, self.lost, self.twice = late, delay, lost, twice


# ---- what stands in for modules
class _Time:
    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return _now[-1].now if _now else time.monotonic()

    time = perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        _now[-1].sleep(seconds)


class _Thread:
    def __init__(self, target: Callable[..., None], args: Sequence[Any] = (), name: str = "", daemon: bool = True):
        self._work = lambda: target(*args)
        self._task: Task | None = None

    def start(self) -> None:
        world = _now[-1]
        assert world.current is not None
        self._task = world.start(world.current.process, self._work)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_done

    def join(self, timeout: float | None = None) -> None:
        world, task = _now[-1], self._task
        assert task is not None
        end = float("inf") if timeout is None else world.now + timeout
        while not task.is_done and world.now < end:
            world.wait(min(end - world.now, 1e6), f"end of {id(task)}")


class _Event:
    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        _now[-1].tell(f"event {id(self)}")

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            _now[-1].wait(1e6 if timeout is None else timeout, f"event {id(self)}")
        return self._is_set


class _Threading:
    Thread, Event = _Thread, _Event

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


@contextmanager
def in_its_own_time(*packages: str) -> Iterator[None]:
    """Give every module of these packages that is there the world's time and threads."""
    instead: dict[Any, Any] = {time: _Time(), threading: _Threading()}
    changed = []
    for name, module in list(sys.modules.items()):
        if not name.startswith(packages):
            continue
        for known, new in instead.items():
            if getattr(module, known.__name__, None) is known:
                setattr(module, known.__name__, new)
                changed.append((module, known))
    try:
        yield
    finally:
        for module, known in changed:
            setattr(module, known.__name__, known)
