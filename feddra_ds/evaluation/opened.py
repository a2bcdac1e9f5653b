"""A trained model and the split that it is to look at: what evaluate, embed and search open alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddra_ds.data.format.dataset import Dataset
from feddra_ds.distributed.shares import ALONE, World
from feddra_ds.evaluation.gallery import Gallery, embed_clients, open_split
from feddra_ds.evaluation.models import Models, open_models


@dataclass(frozen=True)
class Opened:
    """dataset: at `root`, its client_ids those to look at. how: the options of gallery.embed_clients."""

    models: Models
    root: str
    dataset: Dataset
    split: str
    ema: bool
    how: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """What a command's JSON begins with."""
        of = {"model": str(self.models.source), "round": self.models.round, "data": self.root}
        return of | {"split": self.split, "ema": self.ema}

    def galleries(self, by: Models | None = None) -> dict[str, Gallery]:
        """The clients' pairs of the split, embedded by the models, or by others: gallery.embed_clients."""
        return embed_clients(by or self.models, self.dataset, self.dataset.client_ids, self.split, **self.how)


def open_for(
    path: str | Path,
    *,
    data: str | Path | None,
    split: str,
    clients: Sequence[str] | None,
    device: str,
    max_pairs: int | None,
    batch_size: int,
    num_workers: int,
    seed: int,
    ema: bool,
    world: World = ALONE,
) -> Opened:
    """Open the model or models at `path` and a split of `data`; the options are those of evaluate.evaluate.

    Raises ValueError, whose message names the option and what to do, and DataError for data that cannot be read.
    """
    models = open_models(path, device, ema=ema, local_rank=world.local_rank)
    root = models.data_root(None if data is None else str(data))
    dataset = open_split(models, root, split, clients)
    how = {"max_pairs": max_pairs, "batch_size": batch_size, "seed": seed, "num_workers": num_workers, "world": world}
    return Opened(models, root, dataset, split, ema, how)
