"""The package's logger: every line from rank 0, warnings from the others."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("feddra_ds")


def setup(rank: int, *, verbose: bool = False) -> None:
    """Send the package's log to stderr: every line from rank 0, warnings (with their rank) from the others."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
