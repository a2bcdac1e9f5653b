"""`data.order: streaming`: shards one after the other through webdataset's shuffle, for remote or huge sets (`stream`).

Which samples a batch holds depends on the number of ranks of the slot, unlike in the exact order, and not on the number of
workers; for the same ranks it is a function of (seed, client, position). A position counts batches: Position(0, step).
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.decode import RawSample, Task
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.stream import Item, Stream

_SPARES = 8  # samples that follow a batch, which stand in for its bad ones


def build_data(
    dataset: Dataset, client_ids: Sequence[str], split: str, *, config: DataConfig, **kwargs: Any
) -> ClientData:
    """The data of one owner in the order that data.order asks for; the arguments are ClientData's."""
    kind = StreamingData if config.order == "streaming" else ClientData
    return kind(dataset, client_ids, split, config=config, **kwargs)


class StreamingData(ClientData):
    """ClientData in streaming order: the same methods and batches' form; see the module's docstring.

    Training batches are this rank's own part and depend on the number of ranks. Evaluation samples do not: every rank reads
    the shards that they come from, and decodes its part.
    """

    def _prepare(self, dataset: Dataset, client_ids: Sequence[str], split: str, batch_size: int) -> None:
        self._shards = [dataset.stream(client, split) for client in client_ids]
        self._buffer = dataset.options.shuffle_buffer
        self._size = batch_size // self.ranks_per_slot
        self._client_of = [part.client for part in self._shards for _ in part.places]
        self._readers: list[_Reader] = []  # the one that reads ahead, or none
        weakref.finalize(self, _stop, self._readers)

    def _new_stream(self) -> Stream:
        order = (self.source.seed, self.source.name)
        return Stream(self._shards, *order, buffer=self._buffer, rank=self.slot_rank, num_ranks=self.ranks_per_slot)

    def batches(self, position: Position, num_steps: int) -> Iterator[Batch]:
        """This rank's part of the next `num_steps` training batches, augmented: a pure function of the position.

        Raises DataError where a shard cannot be read, or too many samples are bad.
        """
        tasks = (self._task_at(position.step + step) for step in range(num_steps))
        return self._stream(tasks, lambda task: None)

    def prefetch(self, position: Position, num_steps: int) -> None:
        """Start reading, in the background, what `batches(position, …)` will give."""
        self._reader_at(position.step)

    def advance(self, position: Position, num_steps: int) -> Position:
        """The position after `num_steps` batches from `position`."""
        return Position(0, position.step + num_steps)

    def evaluation_batches(
        self,
        num_pairs: int | None,
        batch_size: int,
        seed: int | None = None,
        draw: int | None = None,
        *,
        whole_batches: bool = False,
    ) -> Iterator[Batch]:
        """This rank's contiguous part of a sample of `num_pairs` (None: all), in batches of `batch_size`.

        The sample is the beginning of a pass of its own over the shards, set by (seed, client, draw); the parts are as in
        ClientData. A bad sample is replaced by another of the part.
        """
        size = self.evaluation_size(num_pairs)
        mixed = min(self._buffer, 4 * size)
        items = Stream(self._shards, self.source.seed, self.source.name, "evaluation", draw, buffer=mixed).sample(size)
        first, last = self._evaluation_part(len(items), batch_size if whole_batches else 1)
        mine = items[first:last]
        tasks = (
            self._task(mine[i : i + batch_size], mine[:i] + mine[i + batch_size :], evaluate=True)
            for i in range(0, len(mine), batch_size)
        )
        yield from self._stream(tasks, lambda task: None)

    def _num_known(self) -> int:
        is_counted = all(part.total is not None for part in self._shards)
        return self.num_samples if is_counted else max(self.num_samples, self._seen)

    def _task_at(self, step: int) -> Task:
        reader = self._reader_at(step)
        try:
            batch, after = reader.take(self.pool.timeout_s, self.source.name)
        except DataError:
            _stop(self._readers)
            raise
        return self._task(batch, after)

    def _task(self, batch: list[Item], others: list[Item], evaluate: bool = False) -> Task:
        raws = [self._raw(item, evaluate) for item in batch]
        spares = [self._raw(item, evaluate) for item in others[:_SPARES]]
        return Task(0, len(raws), raws=tuple(raws), spares=tuple(spares))

    def _raw(self, item: Item, evaluate: bool) -> RawSample:
        assert item.raw is not None
        client = self._client_of[item.shard]
        key = item.raw.key if len(self._shards) == 1 else f"{client}/{item.raw.key}"
        return RawSample(key, -1 if evaluate else item.epoch, item.raw)

    def _reader_at(self, step: int) -> _Reader:
        """What reads ahead, at batch `step`: the one there is, where it has just come to it."""
        if not self._readers or self._readers[0].step != step:
            _stop(self._readers)
            self._readers.append(_Reader(self._new_stream().batches(self._size, step), step, self.pool.depth))
        return self._readers[0]


def _stop(readers: list[_Reader]) -> None:
    while readers:
        readers.pop().stop()


class _Reader:
    """A thread that takes batches off a stream, `depth` of them ahead. step: the number of the next one."""

    def __init__(self, batches: Iterator[tuple[list[Item], list[Item]]], step: int, depth: int):
        self.step = step
        self._queue: queue.Queue[tuple[list[Item], list[Item]] | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(batches,), name="feddra-stream", daemon=True).start()

    def _run(self, batches: Iterator[tuple[list[Item], list[Item]]]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, what: tuple[list[Item], list[Item]] | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(what, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def take(self, timeout_s: float, client: str) -> tuple[list[Item], list[Item]]:
        """The next batch and what follows it. Raises DataError, also when none comes in time."""
        try:
            found = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise DataError(f"client {client}: no batch within {timeout_s:.0f} s; are its shards reachable?") from None
        if isinstance(found, BaseException):
            raise found
        self.step += 1
        return found

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()
