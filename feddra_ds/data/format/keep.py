"""Which samples of a shard are of one client's split, where a shard holds those of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from feddra_ds.data.format.indexing import info_of
from feddra_ds.data.format.split_by_hash import group_hash, is_val


class Keep(Protocol):
    """Which samples of shards are of one client's split."""

    def __call__(self, shard: int, number: int, key: str, info: bytes | None) -> bool:
        """Whether the sample `number` of a shard is, given its key and its json."""

    def check(self, shard: int, read: int) -> str | None:
        """What is wrong with a shard that had `read` samples in all; None where nothing is."""


@dataclass(frozen=True)
class BySide:
    """A sample is of a split where it is on that side of val_fraction."""

    fraction: float
    split: str

    def __call__(self, shard: int, number: int, key: str, info: bytes | None) -> bool:
        group = np.array([int(group_hash(key, {} if info is None else info_of(info)), 16)], dtype=np.uint64)
        return bool(is_val(group, self.fraction)[0]) == (self.split == "val")

    def check(self, shard: int, read: int) -> str | None:
        return None


@dataclass(frozen=True)
class Among:
    """A sample is of a split where an index says so. numbers, sizes: of each shard, the samples that are, and how many it has."""

    numbers: list[frozenset[int]]
    sizes: list[int]

    def __call__(self, shard: int, number: int, key: str, info: bytes | None) -> bool:
        return number in self.numbers[shard]

    def check(self, shard: int, read: int) -> str | None:
        if read == self.sizes[shard]:
            return None
        return (f"has {read} samples as webdataset reads them, and {self.sizes[shard]} in its index: names come twice in it, or "
                "members of a sample are apart; data.order=exact reads it")  # fmt: skip
