"""Rank-aware log lines and the run's metrics.jsonl."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("feddra_ds")


def setup(rank: int, *, verbose: bool = False) -> None:
    """Send the package's log to stderr: every line from rank 0, warnings (with their rank) from the others."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for one line: the first `most`, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def by_reason(excluded: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Ids of excluded clients by their reason, so that a slot that is lost is one line."""
    out: dict[str, list[str]] = {}
    for item in excluded:
        out.setdefault(item["reason"], []).append(item["id"])
    return out


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


class MetricsFile:
    """metrics.jsonl, one line a round; a resumed run drops the lines of rounds that it will repeat."""

    def __init__(self, path: Path, next_round: int, last: dict[str, Any] | None = None):
        """next_round: the first round that will be written; last: the line before it, where a kill kept it from the file."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["round"] < next_round]
        if last is not None and (not kept or kept[-1]["round"] < last["round"]):
            kept.append(last)
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off mid-write is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
