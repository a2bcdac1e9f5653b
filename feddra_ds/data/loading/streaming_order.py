"""The streaming order as a pure function of the index; knows no torch, so that workers start quickly.

Legend: n samples of the client, R ranks of its slot, W decode workers per rank, b pairs of a rank's part of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from feddra_ds.common.errors import DataError
from feddra_ds.data.loading.order import Order, Position, permutation, seeded

logger = logging.getLogger("feddra_ds")


def split_shards(samples_per_shard: Sequence[int], num_readers: int) -> list[list[int]] | None:
    """Shards of each reader, as even in samples as whole shards allow; None where there are fewer shards than readers."""
    if len(samples_per_shard) < num_readers:
        return None
    readers: list[list[int]] = [[] for _ in range(num_readers)]
    loads = [0] * num_readers
    for shard in sorted(range(len(samples_per_shard)), key=lambda s: (-samples_per_shard[s], s)):
        reader = min(range(num_readers), key=lambda r: (loads[r], len(readers[r]), r))
        readers[reader].append(shard)
        loads[reader] += samples_per_shard[shard]
    return [sorted(shards) for shards in readers]


def shuffle_through_buffer(samples: np.ndarray, size: int, *seed: object) -> np.ndarray:
    """The order in which a shuffle buffer of `size` gives back a stream, (n,) int64; size 1 changes nothing."""
    key = np.frombuffer(seeded("buffer", *seed)[:16], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(len(samples))
    buffer: list[int] = []
    out = []
    for number, sample in enumerate(samples.tolist()):
        buffer.append(sample)
        if len(buffer) >= size:
            pick = int(draws[number - size + 1] % len(buffer))
            buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
            out.append(buffer.pop())
    rest = permutation(len(buffer), "buffer's rest", *seed)
    return np.array(out + [buffer[i] for i in rest], dtype=np.int64)


class ReaderOrder(Order):
    """One reader's passes over its own samples. members: (m,) the samples; shard_of: (n,) every sample's shard."""

    def __init__(
        self,
        seed: int,
        client: str,
        reader: int,
        members: np.ndarray,
        shard_of: np.ndarray,
        batch_size: int,
        buffer: int,
    ):
        super().__init__(seed, client, len(members), batch_size)
        self.reader, self.members, self.shard_of, self.buffer = reader, members, shard_of, buffer
        self._spans: tuple[int, np.ndarray, np.ndarray] = (-1, members[:0], members[:0])

    def _samples_of(self, epoch: int) -> np.ndarray:
        shards = self.shard_of[self.members]
        present = np.unique(shards)
        order = present[permutation(len(present), "shards", self.seed, self.client, self.reader, epoch)]
        stream = np.concatenate([self.members[shards == shard] for shard in order])
        return shuffle_through_buffer(stream, self.buffer, self.seed, self.client, self.reader, epoch)

    def substitutes(self, position: Position, entry: int) -> Iterator[int]:
        """The samples to try in place of the bad entry: from the batch's own shards first, which are already here."""
        own = self.batch(position)[:, 1]
        place = ("stream", self.seed, self.client, self.reader, position.epoch, position.step)
        others = self.members[permutation(len(self.members), *place)]
        near, free = np.isin(self.shard_of[others], self.shard_of[own]), ~np.isin(others, own)
        yield from others[near & free][entry :: self.batch_size].tolist()
        for mask in (near & free, ~near & free, ~free):
            yield from others[mask].tolist()

    def shards_from(self, position: Position, ahead: int) -> list[int]:
        """The shards in use at `position`, and the `ahead` next ones of this pass."""
        epoch, shards, span = self._spans
        if epoch != position.epoch:
            used = self.shard_of[self._entries(position.epoch)[:, 1]]
            shards, first = np.unique(used, return_index=True)
            last = len(used) - 1 - np.unique(used[::-1], return_index=True)[1]
            order = np.argsort(first)
            shards, span = shards[order], np.stack([first[order], last[order]])
            self._spans = (position.epoch, shards, span)
        start = position.step * self.batch_size
        current, coming = shards[(span[0] <= start) & (span[1] >= start)], shards[span[0] > start]
        return [*current.tolist(), *coming[:ahead].tolist()]


class StreamOrder(Order):
    """One rank's order over its W readers. Positions count the client's batches, as the exact order's do.

    Raises DataError where a reader would have fewer samples than the rank's part of a batch.
    """

    def __init__(
        self,
        seed: int,
        client: str,
        shard_of: np.ndarray,
        batch_size: int,
        *,
        rank: int,
        num_ranks: int,
        num_workers: int,
        buffer: int,
    ):
        super().__init__(seed, client, len(shard_of), batch_size)
        self.num_ranks, self.num_workers = num_ranks, num_workers
        part, num_readers = batch_size // num_ranks, num_ranks * num_workers
        counts = np.bincount(shard_of).tolist()
        self.split = split_shards(counts, num_readers)
        if self.split is not None and min(sum(counts[s] for s in own) for own in self.split) < part:
            self.split = None
        fewest = len(shard_of) // num_readers if self.split is None else part
        if fewest < part:
            raise DataError(
                f"data.order: streaming splits client {client}'s {len(shard_of)} pairs over {num_ranks} ranks × {num_workers} "
                f"workers, {fewest} each, fewer than a rank's {part} of a batch; use data.order=exact, or lower data.num_workers"
            )
        if self.split is None:
            logger.warning(
                "client %s: its %d shards do not split over %d ranks × %d workers, so its %d samples do; every reader "
                "reads all of its shards", client, len(counts), num_ranks, num_workers, len(shard_of),
            )  # fmt: skip
        by_shard = np.argsort(shard_of, kind="stable")
        self.readers = []
        for reader in range(rank * num_workers, (rank + 1) * num_workers):
            if self.split is not None:
                members = by_shard[np.isin(shard_of[by_shard], self.split[reader])]
            else:
                members = by_shard[reader::num_readers]
            self.readers.append(ReaderOrder(seed, client, reader, members, shard_of, part, buffer))

    def _reader(self, position: Position) -> tuple[ReaderOrder, Position]:
        step = self.taken(position)
        reader = self.readers[step % self.num_workers]
        return reader, reader.advance(Position(), step // self.num_workers)

    def batch(self, position: Position) -> np.ndarray:
        """This rank's part of the batch: (b, 2) int64, the reader's pass and the sample."""
        reader, own = self._reader(position)
        return reader.batch(own)

    def substitutes(self, position: Position, entry: int) -> Iterator[int]:
        """The samples to try in place of a bad entry; see ReaderOrder.substitutes."""
        reader, own = self._reader(position)
        return reader.substitutes(own, entry)

    def shards_from(self, position: Position, ahead: int) -> list[int]:
        """The next shards of every reader of this rank."""
        out: list[int] = []
        for step in range(self.num_workers):
            reader, own = self._reader(self.advance(position, step))
            out += reader.shards_from(own, ahead)
        return list(dict.fromkeys(out))
