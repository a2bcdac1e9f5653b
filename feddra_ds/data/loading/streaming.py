"""`data.order: streaming`: shards one after the other through a seeded shuffle buffer, for remote or huge sets.

Legend: n samples of the client, R ranks of its slot, W decode workers per rank (1 where a thread decodes), b pairs of
a rank's part of a batch.

A client's shards are split over its R·W readers by this module: disjoint, together all of them, nothing of another
client (webdataset's own splitter knows no clients). A rank's step k is made by its reader k mod W. Each reader passes
over its shards again and again, every time in a new seeded order of shards and through the buffer.

Which samples a batch holds therefore depends on R and W, unlike the exact order; for the same R and W it is a function
of (seed, client, position) all the same. The order is computed from the index alone, so resuming reads nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.remote import FetchAhead
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.decode import Task
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.streaming_order import StreamOrder

_SHARDS_AHEAD = 2


def build_data(
    dataset: Dataset, client_ids: Sequence[str], split: str, *, config: DataConfig, **kwargs: Any
) -> ClientData:
    """The data of one owner in the order that data.order asks for; the arguments are ClientData's."""
    kind = StreamingData if config.order == "streaming" else ClientData
    return kind(dataset, client_ids, split, config=config, **kwargs)


class StreamingData(ClientData):
    """ClientData in streaming order: the same methods, positions and batches' form; see the module's docstring.

    Training batches are this rank's own part and depend on the number of ranks and workers; evaluation samples do not,
    and are drawn from as few shards as have twice the pairs asked for.
    """

    def __init__(self, dataset: Dataset, client_ids: Sequence[str], split: str, **kwargs: Any):
        super().__init__(dataset, client_ids, split, **kwargs)
        source = self.source
        order = source.order
        if order is not None:
            order = StreamOrder(
                source.seed,
                source.name,
                source.shard_of(),
                order.batch_size,
                rank=self.slot_rank,
                num_ranks=self.ranks_per_slot,
                num_workers=max(1, self.pool.num_workers),
                buffer=dataset.options.shuffle_buffer,
            )
        self.source = replace(source, order=order, by_shard=True, uid=source.uid)
        self._part = slice(0, self._part.stop - self._part.start)
        self._ahead_of_reader = FetchAhead(self._fetch) if dataset.store is not None else None

    def _training_task(self, position: Position) -> Task:
        if self._ahead_of_reader is not None:
            assert isinstance(self.source.order, StreamOrder)
            shards = self.source.order.shards_from(position, _SHARDS_AHEAD)
            self._ahead_of_reader.want([self.source.shard_path(shard)[1] for shard in shards])
        return super()._training_task(position)

    def _fetch(self, address: str) -> None:
        store = self.source.parts[0].store
        assert store is not None
        store.local(address)
