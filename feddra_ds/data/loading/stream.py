"""The streaming order: shards one after the other through webdataset's shuffle, and back to any place of it unread.

Order of shards and shuffle are functions of (seed, client, epoch). To go on in the middle, the order is run through again on
places alone, for which it takes no more than the number of samples of each shard that was read to its end: a shard whose
samples are all taken is not read again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.remote import OpenAhead, Store, is_remote
from feddra_ds.data.format.stream import Raw, Shards
from feddra_ds.data.loading.order import permutation, seeded

_SHARDS_AHEAD = 2


@dataclass(eq=False)
class Item:
    """A sample on its way: its shard, its number there, the pass it belongs to, and what it holds once it was read."""

    shard: int
    number: int
    epoch: int
    raw: Raw | None = None


class Stream:
    """One rank's samples of a client (or of several pooled), pass after pass.

    A rank has every num_ranks-th shard, for ever; with fewer shards than ranks, every num_ranks-th sample of each. order:
    what seeds it, beside the pass. Iterating over it begins at the beginning.
    """

    def __init__(self, parts: Sequence[Shards], *order: object, buffer: int, rank: int = 0, num_ranks: int = 1):
        self.parts, self.order, self.buffer = list(parts), order, buffer
        shards = [(part, shard) for part in self.parts for shard in range(len(part.places))]
        self.shards = shards
        self.shares_shards = len(shards) < num_ranks
        self.own = list(range(len(shards))) if self.shares_shards else list(range(rank, len(shards), num_ranks))
        self.rank, self.num_ranks = rank, num_ranks
        self._stores: dict[str, Store] = {}
        self._ahead = OpenAhead(lambda place: self._stores[place].opened(place))
        self._skipping = False
        self._unread: dict[int, dict[tuple[int, int], Item]] = {}  # by shard, then by number and pass

    def batches(self, size: int, skip: int = 0) -> Iterator[tuple[list[Item], list[Item]]]:
        """(a batch of `size` samples, as many that come after it), for ever, from the batch number `skip` on.

        No sample is twice in a batch: what would come again waits until after it. Raises DataError where a shard cannot be
        read, and where this rank has fewer samples than a batch.
        """
        self._skipping, self._unread = skip > 0, {}
        following = self._batches(size)
        for _ in range(skip):
            for item in next(following):
                self._unread.get(item.shard, {}).pop((item.number, item.epoch), None)
        self._skipping = False
        now = self._filled(next(following))
        while True:
            after = self._filled(next(following))
            yield now, after
            now = after

    def sample(self, size: int | None) -> list[Item]:
        """The first `size` samples of the first pass (None: all of it)."""
        out = []
        for item in self._shuffled(0):
            out.append(item)
            if len(out) == size:
                break
        return out

    def _batches(self, size: int) -> Iterator[list[Item]]:
        items: Iterator[Item] = chain.from_iterable(self._shuffled(epoch) for epoch in count())
        waiting: list[Item] = []
        while True:
            batch: list[Item] = []
            here: set[tuple[int, int]] = set()
            again: list[Item] = []
            items, waiting = chain(waiting, items) if waiting else items, []
            while len(batch) < size:
                item = next(items)
                if (item.shard, item.number) in here:
                    again.append(item)
                    if len(again) > size:  # a whole pass brings nothing new
                        self._too_few(size)
                    continue
                here.add((item.shard, item.number))
                batch.append(item)
            waiting = again
            yield batch

    def _too_few(self, size: int) -> None:
        name = "+".join(dict.fromkeys(part.client for part in self.parts))
        raise DataError(f"data.order: streaming gives this rank of client {name} fewer pairs than its {size} of a batch; use "
                        "data.order=exact, smaller shards, or fewer ranks per slot")  # fmt: skip

    def _shuffled(self, epoch: int) -> Iterator[Item]:
        """One pass, through webdataset's own shuffle."""
        from webdataset.filters import shuffle  # on demand: it imports torch
        from webdataset.pipeline import DataPipeline

        rng = random.Random(seeded("shuffle", *self.order, self.rank, epoch))
        through = shuffle(self.buffer, initial=self.buffer, rng=rng)
        found = False
        for item in DataPipeline(lambda: iter(self._own_shards(epoch)), self._items_of(epoch), through):
            found = True
            yield item
        if not found:
            self._too_few(1)

    def _own_shards(self, epoch: int) -> list[int]:
        """This rank's shards in the order of a pass: webdataset's place for splitting by node."""
        order = permutation(len(self.own), "shards", *self.order, self.rank, epoch)
        return [self.own[i] for i in order]

    def _items_of(self, epoch: int):  # type: ignore[no-untyped-def]
        def items(shards: Iterator[int]) -> Iterator[Item]:
            order = list(shards)
            for place, shard in enumerate(order):
                if not self._skipping:
                    self._open_ahead(order[place : place + 1 + _SHARDS_AHEAD])
                yield from self._items(shard, epoch)

        return items

    def _open_ahead(self, shards: Sequence[int]) -> None:
        """Have those that lie at an address copied here and opened, in the background, the next one first."""
        places = [(part.store, part.places[i]) for part, i in (self.shards[shard] for shard in shards)]
        stores = {place: store for store, place in places if store is not None and is_remote(place)}
        self._stores |= stores
        self._ahead.want(list(stores))

    def _items(self, shard: int, epoch: int) -> Iterator[Item]:
        part, place = self.shards[shard]
        known, first = part.counts[place], 0
        if self._skipping and known is not None:
            unread = self._unread.setdefault(shard, {})
            while first < known and self._skipping:  # which may end in the middle of a shard
                if self._is_mine(shard, first):
                    item = unread[first, epoch] = Item(shard, first, epoch)
                    yield item
                first += 1
            if first == known:
                return
        for number, raw in enumerate(part.read(place, self._ahead)):
            if number >= first and self._is_mine(shard, number):
                yield Item(shard, number, epoch, raw)

    def _is_mine(self, shard: int, number: int) -> bool:
        return not self.shares_shards or (shard + number) % self.num_ranks == self.rank

    def _filled(self, batch: list[Item]) -> list[Item]:
        """The batch, each sample read; what is read of a shard fills all that still wait for it."""
        for item in batch:
            if item.raw is None:
                self._read_again(item.shard)
        return batch

    def _read_again(self, shard: int) -> None:
        part, place = self.shards[shard]
        waiting: dict[int, list[Item]] = {}
        for (number, _), item in self._unread.pop(shard, {}).items():
            waiting.setdefault(number, []).append(item)
        for number, raw in enumerate(part.read(place, self._ahead)):
            for item in waiting.pop(number, []):
                item.raw = raw
            if not waiting:
                return
        if waiting:
            raise DataError(f"{part.places[place]}: has fewer samples than when it was counted; was it changed?")
