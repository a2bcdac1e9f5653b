"""The order of samples: pure functions of (seed, client, position) that know no ranks, workers or files.

Legend: n samples of the client, B pairs in a batch, e epoch, s step within the epoch.

Epoch e is a permutation of the n samples, seeded by (seed, client, e). Its list of entries is what the epoch before
left over (a tail shorter than B), then the permutation; step s takes entries [sB, (s+1)B). In the batch that straddles
two epochs no pair appears twice: samples of the tail that would come again within that batch are moved behind it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Position:
    """Where a client stands in its data: the next batch to take. JSON-able through `to_dict` and `Position(**d)`."""

    epoch: int = 0
    step: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def seeded(*parts: object) -> bytes:
    """64 pseudo-random bytes, a pure function of the parts; the same on every platform and version."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=64).digest()


def permutation(n: int, *parts: object) -> np.ndarray:
    """A permutation of range(n), (n,) int64, seeded by the parts.

    Sorts raw Philox words instead of calling Generator.permutation: numpy fixes the former for ever, not the latter.
    """
    key = np.frombuffer(seeded("permutation", *parts)[:16], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


def uniform(n: int, *parts: object) -> np.ndarray:
    """n numbers in [0, 1), float64, seeded by the parts; the same on every platform and version."""
    key = np.frombuffer(seeded("uniform", *parts)[:16], dtype=np.uint64)
    return (np.random.Philox(key=key).random_raw(n) >> np.uint64(11)) * 2.0**-53


class Order:
    """Training order of one client: batches of (epoch, sample) entries, and substitutes for bad samples."""

    def __init__(self, seed: int, client: str, num_samples: int, batch_size: int):
        if num_samples < batch_size:
            raise ValueError(
                f"data.batch_size: client {client} has {num_samples} pairs, less than a batch of {batch_size}"
            )
        self.seed, self.client, self.num_samples, self.batch_size = seed, client, num_samples, batch_size
        self._cached: tuple[int, np.ndarray] = (-1, np.empty((0, 2), dtype=np.int64))

    def steps(self, epoch: int) -> int:
        """Whole batches of the epoch's list."""
        n, b = self.num_samples, self.batch_size
        return (epoch + 1) * n // b - epoch * n // b

    def batch(self, position: Position) -> np.ndarray:
        """Entries of the batch at `position`: (B, 2) int64, the epoch each sample belongs to and its index."""
        position = self.advance(position, 0)
        start = position.step * self.batch_size
        return self._entries(position.epoch)[start : start + self.batch_size]

    def advance(self, position: Position, steps: int) -> Position:
        """The position `steps` batches further on; always one at which a batch starts."""
        n, b = self.num_samples, self.batch_size
        taken = self.taken(position) + steps
        epoch = max(0, taken * b // n - 1)
        while (epoch + 1) * n // b <= taken:
            epoch += 1
        return Position(epoch, taken - epoch * n // b)

    def taken(self, position: Position) -> int:
        """Batches before `position`, counted from the beginning."""
        return position.epoch * self.num_samples // self.batch_size + position.step

    def substitutes(self, position: Position, entry: int) -> Iterator[int]:
        """The samples to try, in turn, in place of a bad entry of a batch: a function of the position and the entry.

        The entries of a batch try different samples, none of the batch's own, for as long as the client has others.
        """
        own = self.batch(position)[:, 1]
        place = (self.seed, self.client, position.epoch, position.step)
        yield from _others(self.num_samples, set(own.tolist()), entry, self.batch_size, *place)

    def _entries(self, epoch: int) -> np.ndarray:
        """The epoch's list: (tail + n, 2) int64."""
        cached, entries = self._cached
        if cached == epoch:
            return entries
        n, b = self.num_samples, self.batch_size
        first = cached + 1 if 0 <= cached < epoch else 0
        if n >= 2 * b:  # then only the first batch depends on the epochs before, and the tail lies behind it
            first = max(first, epoch - 1)
        if first != cached + 1:
            entries = entries[:0]
        for e in range(first, epoch + 1):
            left = e * n % b if len(entries) else 0
            entries = self._extend(entries[len(entries) - left :], e)
        self._cached = (epoch, entries)
        return entries

    def _samples_of(self, epoch: int) -> np.ndarray:
        """The epoch's samples in order, (n,) int64."""
        return permutation(self.num_samples, "epoch", self.seed, self.client, epoch)

    def _extend(self, tail: np.ndarray, epoch: int) -> np.ndarray:
        samples = self._samples_of(epoch)
        if len(tail):
            fresh = ~np.isin(samples, tail[:, 1])
            head = np.flatnonzero(fresh)[: self.batch_size - len(tail)]
            rest = np.delete(np.arange(len(samples)), head)
            samples = samples[np.concatenate([head, rest])]
        entries = np.stack([np.full(len(samples), epoch, dtype=np.int64), samples], axis=1)
        return np.concatenate([tail, entries])


class EvaluationOrder:
    """A seeded sample without repeats, in a seeded order: one for the whole run, or one of each `draw`.

    Not in the order of the shards, where one patient's images are neighbours and make their batches harder.
    """

    def __init__(
        self,
        seed: int,
        client: str,
        num_samples: int,
        num_pairs: int | None,
        batch_size: int,
        shard_of: np.ndarray | None = None,
        draw: int | None = None,
    ):
        """draw: which of many samples; None for the one of the whole run. shard_of: (n,) each sample's shard; the sample
        then comes from as few shards as have twice its pairs."""
        self.seed, self.client, self.num_samples, self.batch_size = seed, client, num_samples, batch_size
        self.size = num_samples if num_pairs is None else min(num_pairs, num_samples)
        self.draw = () if draw is None else (draw,)
        drawn = permutation(num_samples, "evaluation", seed, client, *self.draw)
        if shard_of is not None and num_pairs is not None:
            counts = np.bincount(shard_of)
            shards = permutation(len(counts), "evaluation shards", seed, client, *self.draw)
            enough = int(np.searchsorted(np.cumsum(counts[shards]), 2 * num_pairs)) + 1
            near = np.isin(shard_of[drawn], shards[:enough])
            drawn = np.concatenate([drawn[near], drawn[~near]])
        self.samples = drawn[: self.size]

    def substitutes(self, entry: int) -> Iterator[int]:
        """The samples to try in place of a bad entry: outside the list first, then outside its batch."""
        place = (self.seed, self.client, "evaluation", *self.draw)
        listed = set(self.samples.tolist())
        yield from (s for s in _others(self.num_samples, listed, entry, self.size, *place) if s not in listed)
        near = self.samples[max(0, entry - self.batch_size + 1) : entry + self.batch_size]
        window = 2 * self.batch_size
        yield from _others(self.num_samples, set(near.tolist()), entry % window, window, *place)


def _others(n: int, avoid: set[int], entry: int, stride: int, *place: object) -> Iterator[int]:
    """Every sample, in a seeded order: the entry's own share of those outside `avoid`, then all those, then the rest.

    The shares of entries 0 … stride - 1 are disjoint. The order is an arithmetic walk modulo n, which costs nothing to
    start, unlike a permutation of a large client.
    """
    words = np.frombuffer(seeded("substitutes", *place), dtype=np.uint64)
    start, step = int(words[0]) % n, 1 + int(words[1]) % n
    while math.gcd(step, n) != 1:
        step += 1
    walk = lambda indices: ((start + j * step) % n for j in indices)
    if n <= 64 * len(avoid):  # a share of the walk might lie wholly in `avoid`, so share out what is free
        free = [s for s in walk(range(n)) if s not in avoid]
        yield from free[entry::stride]
        yield from free
    else:
        yield from (s for s in walk(range(entry, n, stride)) if s not in avoid)
        yield from (s for s in walk(range(n)) if s not in avoid)
    yield from (s for s in walk(range(n)) if s in avoid)
