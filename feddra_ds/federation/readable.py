"""Data that cannot be read any more cost their client its part in the round, and nobody else anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from feddra_ds.common.errors import DataError
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position


@dataclass
class Readable:
    """A client's training batches for one stage; `fault` says why they could not be read, or is None.

    From the first batch that cannot be read on, this rank gives blank ones to the end of the stage: the ranks of its slot,
    which may know nothing of it, meet it in every collective, and the client's update is excluded afterwards.
    """

    data: ClientData
    fault: str | None = None

    def batches(self, position: Position, num_steps: int) -> Iterator[Batch]:
        """`num_steps` batches, whatever happens."""
        given = 0
        try:
            for batch in self.data.batches(position, num_steps):
                given += 1
                yield batch
        except DataError as error:
            self.fault = self.fault or str(error)
            yield from (self.data.blank_batch() for _ in range(num_steps - given))
