"""The hosts that a launch will have, each with its ranks, and what lies where on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from feddra_ds.distributed.plan import Plan

_HELP = "give a hostfile, NAME:RANKS,NAME:RANKS, or HOSTSxRANKS such as 16x8"


@dataclass(frozen=True)
class Host:
    """A host's ranks, the slots that have ranks there, and the clients of the slots that begin there."""

    name: str
    num_ranks: int
    slots: tuple[int, ...]
    clients: tuple[int, ...]


def hosts_of_file(path: str) -> list[str]:
    """The host of each rank that a hostfile starts. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"--hostfile: there is no file {path}")
    return _per_rank(list(_of_file(Path(path), "--hostfile")), f"--hostfile: {path}")


def hosts_of(text: str) -> list[str]:
    """The host of each rank, in a launcher's order.

    text: the path of a hostfile (`NAME slots=N` a line), `NAME:RANKS,NAME:RANKS`, or `HOSTSxRANKS`. Raises ValueError.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        counts = [(f"host{index}", int(match[2])) for index in range(int(match[1]))]
    elif Path(text).is_file():
        counts = list(_of_file(Path(text), "--hosts"))
    else:
        counts = []
        for part in text.split(","):
            name, _, ranks = part.strip().rpartition(":")
            if not name or not ranks.isdigit():
                raise ValueError(f"--hosts: {part.strip() or text!r} is no file and no NAME:RANKS; {_HELP}")
            counts.append((name, int(ranks)))
    return _per_rank(counts, f"--hosts: {text}")


def _per_rank(counts: Sequence[tuple[str, int]], given: str) -> list[str]:
    names = [name for name, _ in counts]
    if not sum(ranks for _, ranks in counts):
        raise ValueError(f"{given} has no rank; {_HELP}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{given} has {repeated[0]} more than once")
    return [name for name, ranks in counts for _ in range(ranks)]


def _of_file(path: Path, option: str) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None:
            raise ValueError(f"{option}: {path}, line {number}: must be `NAME slots=N`, got {text!r}")
        yield match[1], int(match[2])


def what_lies_where(layout: Plan, hosts: Sequence[str]) -> list[Host]:
    """The hosts with what the plan puts on each. hosts: of each rank."""
    ranks: dict[str, list[int]] = {}
    for rank, name in enumerate(hosts):
        ranks.setdefault(name, []).append(rank)
    out = []
    for name, here in ranks.items():
        slots = tuple(dict.fromkeys(layout.slot_of(rank) for rank in here))
        first = [layout.slot_of(rank) for rank in here if layout.slot_rank_of(rank) == 0]
        out.append(Host(name, len(here), slots, tuple(index for slot in first for index in layout.clients_of(slot))))
    return out
