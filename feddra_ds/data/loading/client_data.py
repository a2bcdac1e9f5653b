"""Batches of one data owner: training batches by position, and fixed evaluation samples.

Legend: B pairs in a client's batch over all its ranks, b this rank's part of it, S side of the image, T tokens.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch
from transformers import PreTrainedTokenizerBase

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.decode import Decoded, Source, Task
from feddra_ds.data.loading.order import Order, Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.tokens import PAD_MULTIPLE, freeze


class ClientData:
    """One split of one data owner (or of several pooled), as one rank of its slot sees it.

    slot_rank, ranks_per_slot: this rank's index and the ranks of its slot; the caller checks that they divide the batch.
    pool: the decoder to share; without one, this object makes its own. samples: what to take of the split, for each client a
    part of its samples, in place of all (data.order exact).

    Raises DataError for a client without this split, and ValueError for one with fewer training pairs than a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        client_ids: Sequence[str],
        split: str,
        *,
        config: DataConfig,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        slot_rank: int = 0,
        ranks_per_slot: int = 1,
        pool: DecodePool | None = None,
        samples: Sequence[Samples] | None = None,
    ):
        assert config.batch_size % ranks_per_slot == 0, (config.batch_size, ranks_per_slot)
        name = "+".join(client_ids)
        sizes = [dataset.num_samples(c, split) for c in client_ids] if samples is None else list(map(len, samples))
        total = sum(sizes)
        tokenizer_json, pad_id = freeze(tokenizer, config.text_length)
        self.source = Source(
            name=name,
            parts=list(samples or []),
            seed=seed,
            order=None,
            image_size=config.image_size,
            augment=config.augment,
            tokenizer=tokenizer_json,
            pad_id=pad_id,
            text_length=config.text_length,
        )
        self.num_samples, self.split = total, split
        self.slot_rank, self.ranks_per_slot = slot_rank, ranks_per_slot
        self._part = slice(
            slot_rank * (config.batch_size // ranks_per_slot), (slot_rank + 1) * (config.batch_size // ranks_per_slot)
        )
        self.pool = pool or DecodePool(config.num_workers, config.prefetch)
        self._mean, self._std = (torch.tensor(list(v)).reshape(3, 1, 1) for v in (image_mean, image_std))
        self._root = dataset.address
        self._max_bad_fraction = config.max_bad_fraction
        self._ahead: dict[Position, Future[Decoded]] = {}
        self._lock = threading.Lock()
        self._bad: dict[int | str, str] = {}
        self._counted: set[tuple[int, int | str]] = set()
        self._skipped: Counter[str] = Counter()
        self._seen = 0  # pairs that were given, repeats too
        self._prepare(dataset, client_ids, split, config.batch_size)

    def _prepare(self, dataset: Dataset, client_ids: Sequence[str], split: str, batch_size: int) -> None:
        """Set up what reads the samples."""
        self.source.parts = self.source.parts or [dataset.samples(client, split) for client in client_ids]
        if split == "train":
            self.source.order = Order(self.source.seed, self.source.name, self.num_samples, batch_size)

    def batches(self, position: Position, num_steps: int) -> Iterator[Batch]:
        """This rank's part of the next `num_steps` training batches, augmented.

        A pure function of (seed, client, position): called twice, it gives the same batches, whatever the number of
        ranks and workers. Raises DataError when too many samples are bad or the loader fails.
        """
        positions = (self.advance(position, step) for step in range(num_steps))
        return self._stream(map(self._training_task, positions), self._take_ahead)

    def prefetch(self, position: Position, num_steps: int) -> None:
        """Start decoding, in the background, the first of the batches that `batches(position, …)` will give."""
        wanted = [self.advance(position, step) for step in range(min(num_steps, self.pool.depth))]
        for stale in set(self._ahead) - set(wanted):
            self._ahead.pop(stale).cancel()
        for place in wanted:
            if place not in self._ahead:
                self._ahead[place] = self.pool.submit(self.source, self._training_task(place))

    def blank_batch(self) -> Batch:
        """A training batch of this rank's size that holds no pair: black pictures and one token each."""
        size, side = self._part.stop - self._part.start, self.source.image_size
        ids = torch.full((size, PAD_MULTIPLE), self.source.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        mask[:, 0] = 1
        keys = [f"blank {number}" for number in range(size)]
        pixels = torch.zeros((size, 3, side, side), dtype=torch.uint8)
        return Batch(pixels, ids, mask, torch.arange(size), keys, self._mean, self._std)

    def advance(self, position: Position, num_steps: int) -> Position:
        """The position after `num_steps` batches from `position`."""
        return self._order.advance(position, num_steps)

    def evaluation_size(self, num_pairs: int | None) -> int:
        """Pairs, over all ranks, that `evaluation_batches(num_pairs, …)` gives."""
        return self.num_samples if num_pairs is None else min(num_pairs, self.num_samples)

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

        The sample is drawn without repeats by (seed, client, draw), in the same order for any number of ranks; the parts
        have ceil(pairs / ranks) pairs, the last ones fewer, perhaps none. No augmentation. A bad sample is replaced by
        one outside the sample, or, where there is none, by one from another batch, so that sizes never depend on it.
        whole_batches: parts are cut between batches, so that these are the same for any number of ranks.
        """
        assert seed is None or seed == self.source.seed, "the evaluation sample is drawn by the run's seed"
        first, last = self._evaluation_part(self.evaluation_size(num_pairs), batch_size if whole_batches else 1)
        starts = range(first, last, batch_size)
        tasks = (Task(s, min(s + batch_size, last), evaluate=(num_pairs, batch_size, draw)) for s in starts)
        return self._stream(tasks, lambda task: None)

    def _evaluation_part(self, size: int, unit: int) -> tuple[int, int]:
        """(first, last + 1) of this rank's pairs of a sample of that size, cut between multiples of `unit`."""
        per_rank = -(-size // self.ranks_per_slot // unit) * unit
        return min(self.slot_rank * per_rank, size), min((self.slot_rank + 1) * per_rank, size)

    def take_skipped(self) -> dict[str, int]:
        """Bad samples met on this rank since the last call, reason → count; one met twice in a replay counts once."""
        with self._lock:
            out = dict(sorted(self._skipped.items()))
            self._skipped.clear()
            self._counted.clear()
        return out

    @property
    def bad(self) -> dict[int | str, str]:
        """Samples that this rank could not read, by number (in streaming, by key), and why."""
        with self._lock:
            return dict(self._bad)

    def add_bad(self, bad: Mapping[int | str, str]) -> None:
        """Count samples that another rank could not read as this one's. Raises DataError for too many, as `batches` does."""
        with self._lock:
            for sample, reason in bad.items():
                if sample not in self._bad:
                    self._bad[sample] = reason
                    self._skipped[reason] += 1
            self._check_bad()

    @property
    def _order(self) -> Order:
        assert self.source.order is not None, f"split {self.split} has no training order"
        return self.source.order

    def _training_task(self, position: Position) -> Task:
        return Task(self._part.start, self._part.stop, position=position)

    def _take_ahead(self, task: Task) -> Future[Decoded] | None:
        assert task.position is not None
        return self._ahead.pop(task.position, None)

    def _stream(self, tasks: Iterator[Task], ready: Callable[[Task], Future[Decoded] | None]) -> Iterator[Batch]:
        """Batches of the tasks in order, `pool.depth` of them in the making."""
        under_way: deque[tuple[Task, Future[Decoded]]] = deque()
        try:
            while True:
                while len(under_way) < self.pool.depth and (task := next(tasks, None)) is not None:
                    under_way.append((task, ready(task) or self.pool.submit(self.source, task)))
                if not under_way:
                    return
                task, future = under_way.popleft()
                decoded = self.pool.wait(future, self.source, task)
                self._count(decoded)
                yield self._batch(decoded)
        finally:
            for _, future in under_way:
                future.cancel()

    def _batch(self, decoded: Decoded) -> Batch:
        return Batch(
            pixels=torch.from_numpy(decoded.pixels),
            input_ids=torch.from_numpy(decoded.input_ids),
            attention_mask=torch.from_numpy(decoded.attention_mask),
            text_ids=torch.from_numpy(decoded.text_ids),
            keys=decoded.keys,
            mean=self._mean,
            std=self._std,
        )

    def _num_known(self) -> int:
        """Pairs that max_bad_fraction is a fraction of."""
        return self.num_samples

    def _count(self, decoded: Decoded) -> None:
        with self._lock:
            for epoch, sample, reason in decoded.bad:
                self._bad[sample] = reason
                if (epoch, sample) not in self._counted:
                    self._counted.add((epoch, sample))
                    self._skipped[reason] += 1
            self._seen += len(decoded.keys)
            self._check_bad()

    def _check_bad(self) -> None:
        total = self._num_known()
        found, allowed = len(self._bad), self._max_bad_fraction * total
        if self._max_bad_fraction > 0:
            allowed = max(allowed, 1)  # in a small split one bad picture alone may exceed the fraction
        if found > allowed:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(Counter(self._bad.values()).items()))
            first = sorted(self._bad, key=str if any(isinstance(s, str) for s in self._bad) else int)[:3]
            some = ", ".join(s if isinstance(s, str) else self.source.key(s) for s in first)
            raise DataError(
                f"data.max_bad_fraction: client {self.source.name}: {found} of its {total} {self.split} "
                f"samples are unreadable ({reasons}), more than {self._max_bad_fraction:.1%}; "
                f"e.g. {some} under {self._root}"
            )
