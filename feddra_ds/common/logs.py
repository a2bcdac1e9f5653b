"""The package's logger: every line from rank 0, warnings from the others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from feddra_ds.common.errors import ConfigError, mark_told
from feddra_ds.common.text import printable

logger = logging.getLogger("feddra_ds")


class Printable(logging.Formatter):
    """Names and texts from elsewhere cannot move the terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def say_problems(error: ConfigError) -> None:
    """Log what is wrong at once: a launcher ends this rank as soon as another one has ended."""
    for problem in error.problems:
        logger.error("%s", problem)
    mark_told(error)


@contextmanager
def log_to_stderr(rank: int) -> Iterator[None]:
    """While in it, the package's log goes to stderr: every line from rank 0, warnings (with their rank) from the others.

    Where the logger has handlers already, a caller has decided where its log goes, and nothing is changed.
    """
    if logger.handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(Printable(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
