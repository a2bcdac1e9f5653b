"""Labelled pairs of several clients as a classifier reads them: which there are, and what a module makes of their pictures.

Legend: n pairs, F numbers that a module gives for a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn

from feddra_ds.config.schema import AugmentConfig, DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.evaluation.gallery import info_of, split_of
from feddra_ds.model.processor import DualEncoderProcessor

Chosen = NDArray[np.bool_]


@dataclass(frozen=True)
class Labelled:
    """n pairs of a split (of its stand-in, see split_of) of several clients, one after the other.

    samples: each client's. owner: (n,) index into them. names: (n,) as batches have them. keys: (n,) in the client.
    infos: the pairs' json members.
    """

    split: str
    samples: list[Samples]
    owner: NDArray[np.int64]
    names: list[str]
    infos: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def clients(self) -> list[str]:
        """Those that have any."""
        return [own.client for own in self.samples]

    @property
    def keys(self) -> list[str]:
        """(n,) the pairs' keys, each in its client."""
        return [key for own in self.samples for key in own.keys]

    def of(self, clients: Sequence[str]) -> Chosen:
        """(n,) which pairs belong to these clients."""
        return np.isin(self.owner, [i for i, client in enumerate(self.clients) if client in clients])

    def part(self, chosen: Chosen) -> list[Samples]:
        """Each client's samples among the chosen (n,)."""
        by_client = np.split(chosen, np.cumsum([len(own) for own in self.samples])[:-1])
        return [own.part(some, own.split) for own, some in zip(self.samples, by_client, strict=True)]


def find_labelled(dataset: Dataset, clients: Sequence[str], split: str, max_pairs: int | None, seed: int) -> Labelled:
    """The clients' pairs in `split`, of each a seeded sample of at most `max_pairs`. Raises ValueError where there are none."""
    found = []
    for client in clients:
        name = split_of(dataset, client, split)
        if name is None:
            continue
        own = dataset.samples(client, name)
        if max_pairs is not None and len(own) > max_pairs:
            chosen = np.zeros(len(own), dtype=bool)
            chosen[permutation(len(own), "labelled", seed, client)[:max_pairs]] = True
            own = own.part(chosen, name)
        found.append(own)
    if not found:
        raise ValueError(f"no client of {', '.join(clients)} has a {split} split under {dataset.address}")
    pooled = len(found) > 1
    return Labelled(
        split,
        found,
        np.repeat(np.arange(len(found)), [len(own) for own in found]),
        [f"{own.client}/{key}" if pooled else key for own in found for key in own.keys],
        [info_of(own, i) for own in found for i in range(len(own))],
    )


@dataclass(frozen=True)
class Reader:
    """Reads pictures of labelled pairs: augmented ones to train on, whole ones to measure on."""

    dataset: Dataset
    processor: DualEncoderProcessor
    augment: AugmentConfig
    max_bad_fraction: float
    pool: DecodePool
    accelerator: Accelerator

    def data(
        self, pairs: Labelled, chosen: Chosen, *, seed: int, batch_size: int | None = None, num_ranks: int | None = None
    ) -> ClientData:
        """The chosen (n,) pairs as one owner's data, shared by `num_ranks` processes (None: all, 1: each has every batch).

        batch_size: of a training batch over these processes; None for data that nothing trains on.
        """
        ranks = self.accelerator.num_processes if num_ranks is None else num_ranks
        settings = DataConfig(
            root=self.dataset.address,
            batch_size=batch_size or ranks,
            image_size=self.processor.image_size,
            text_length=self.processor.text_length,
            augment=self.augment,
            max_bad_fraction=self.max_bad_fraction,
        )
        return ClientData(
            self.dataset,
            pairs.clients,
            pairs.split,
            config=settings,
            seed=seed,
            tokenizer=self.processor.tokenizer,
            image_mean=self.processor.image_mean,
            image_std=self.processor.image_std,
            slot_rank=self.accelerator.process_index if ranks > 1 else 0,
            ranks_per_slot=ranks,
            pool=self.pool,
            samples=pairs.part(chosen),
        )

    @torch.no_grad()
    def outputs(
        self, module: nn.Module, pairs: Labelled, data: ClientData, batch_size: int
    ) -> tuple[NDArray[np.float32], Chosen, dict[str, int]]:
        """What `module` (eval mode from then on) gives for the pictures of `data`, some of the pairs: (n, F), NaN for the
        others and for what cannot be read; which could, (n,); and reason → number of unreadable pairs. Each process does a
        part, all have the whole."""
        module.eval()
        names: list[str] = []
        rows = []
        for batch in data.evaluation_batches(None, batch_size):
            names += batch.keys
            rows.append(module(batch.to(self.accelerator.device).pixel_values).float().cpu().numpy())
        parts = gather_object([(names, np.concatenate(rows) if rows else None, data.take_skipped())])
        place = {name: i for i, name in enumerate(pairs.names)}
        given = [
            (name, row) for names, rows, _ in parts if rows is not None for name, row in zip(names, rows, strict=True)
        ]
        out = np.full((len(pairs), len(given[0][1])), np.nan, dtype=np.float32)
        read = np.zeros(len(pairs), dtype=bool)
        for name, row in given:
            out[place[name]], read[place[name]] = row, True
        return out, read, dict(sum((Counter(skipped) for *_, skipped in parts), Counter()))
