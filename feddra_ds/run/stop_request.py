"""The wish that a run end after the round that runs, with a checkpoint: SIGUSR1, which SLURM sends before a job's time is up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on
EXIT_CODE = 75

_asked = threading.Event()


def is_asked() -> bool:
    """Whether this process was asked. The ranks tell each other at the end of each round, so one that was is enough."""
    return _asked.is_set()


def keep_exit_code() -> None:
    """A launcher ends all processes when the first one has ended, and srun tells the largest code: be none that it ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def heard_by_signal() -> Iterator[None]:
    """While in it, SIGUSR1 asks; afterwards nothing is asked."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: _asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        _asked.clear()
