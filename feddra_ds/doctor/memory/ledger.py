"""A ledger of memory that is held by purpose, and what its highest point was made of.

Two kinds of memory. A GPU's: what is freed is there again. A process's on the host: glibc gives blocks of 32 MiB and more
back to the system when they are freed, but keeps the smaller ones for itself; resident memory is therefore the large blocks
that live plus the most that small ones ever took, and what lies idle is booked as `KEPT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from feddra_ds.doctor.memory.trace import Event

LARGE = 32 << 20  # glibc's largest M_MMAP_THRESHOLD, which it soon reaches
KEPT = "freed, kept by malloc"
ACTIVATIONS = "activations"


class Blocks(NamedTuple):
    """Bytes in blocks below `LARGE`, and in others."""

    small: int = 0
    large: int = 0

    @property
    def total(self) -> int:
        return self.small + self.large

    def __add__(self, other: Blocks) -> Blocks:  # type: ignore[override]
        return Blocks(self.small + other.small, self.large + other.large)


def blocks(sizes: Iterable[int]) -> Blocks:
    """Allocations of so many bytes each."""
    found = list(sizes)
    large = sum(size for size in found if size >= LARGE)
    return Blocks(sum(found) - large, large)


@dataclass(frozen=True)
class High:
    """The highest point of a phase: bytes by purpose, largest first."""

    phase: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass
class Ledger:
    """Holds and drops amounts by name; `highs` has the highest point of each phase. keeps: as a process's malloc does."""

    keeps: bool
    phase: str = ""
    highs: dict[str, High] = field(default_factory=dict)
    _held: dict[str, Blocks] = field(default_factory=dict)
    _now: Blocks = field(default_factory=Blocks)
    _heap: int = 0  # most that small blocks took so far
    _high: int = 0

    def begin(self, phase: str) -> None:
        """What follows belongs to another phase. A phase may come again: its highest point counts."""
        self.phase = phase
        self._high = self.highs[phase].total if phase in self.highs else 0
        self._look()

    def hold(self, name: str, amount: Blocks) -> None:
        """Hold more under a name."""
        self._held[name] = self._held.get(name, Blocks()) + amount
        self._now += amount
        self._look()

    def held(self, name: str) -> int:
        """Bytes under a name."""
        return self._held.get(name, Blocks()).total

    def drop(self, *names: str) -> None:
        """Free all that is held under these names, if anything is."""
        for name in names:
            gone = self._held.pop(name, Blocks())
            self._now += Blocks(-gone.small, -gone.large)

    def shrink(self, name: str, amount: Blocks) -> None:
        """Free a part of what is held under a name."""
        old = self._held[name]
        self._held[name] = Blocks(old.small - amount.small, old.large - amount.large)
        self._now += Blocks(-amount.small, -amount.large)

    def pulse(self, name: str, amount: Blocks) -> None:
        """Hold, and drop at once."""
        self.hold(name, amount)
        self.shrink(name, amount)

    def replay(self, events: Iterable[Event], on_gradient: Callable[[int], None] = lambda num_bytes: None) -> None:
        """A pass as `StepTracer.run` saw it; `on_gradient` books each parameter's gradient, bytes of it."""
        for kind, num_bytes in events:
            if kind == "gradient":
                on_gradient(num_bytes)
                continue
            amount = Blocks(num_bytes, 0) if num_bytes < LARGE else Blocks(0, num_bytes)
            if kind == "take":
                self.hold(ACTIVATIONS, amount)
            else:
                self.shrink(ACTIVATIONS, amount)

    def _look(self) -> None:
        self._heap = max(self._heap, self._now.small)
        total = self._now.large + (self._heap if self.keeps else self._now.small)
        if total > self._high or self.phase not in self.highs:
            self._high = total
            items = {name: held.total for name, held in self._held.items() if held.total}
            idle = total - sum(items.values())
            if idle:
                items[KEPT] = idle
            self.highs[self.phase] = High(self.phase, dict(sorted(items.items(), key=lambda item: -item[1])))
