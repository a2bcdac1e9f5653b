"""The sides of a fine-tuning, trained on, looked at and measured: their pairs with targets and the frozen encoder's features.

Legend: n pairs, F features, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.evaluation.classifier import ImageEncoder
from feddra_ds.evaluation.labelled import Chosen, Labelled, Reader
from feddra_ds.evaluation.labels import Task


@dataclass(frozen=True)
class Side:
    """Pairs with targets (n, K), -1 unknown, and features (n, F). usable: (n,) those that can be read, with finite features."""

    pairs: Labelled
    targets: NDArray[np.int64]
    features: NDArray[np.float32]
    usable: Chosen

    def labelled(self, clients: Sequence[str]) -> Chosen:
        """(n,) the clients' usable pairs that have any label."""
        return self.usable & self.pairs.of(clients) & (self.targets >= 0).any(1)

    def counts(self, k: int) -> dict[str, int]:
        """Usable pairs with label k by client."""
        known = self.usable & (self.targets[:, k] >= 0)
        return {client: int((known & self.pairs.of([client])).sum()) for client in self.pairs.clients}


def look(
    reader: Reader,
    encoder: ImageEncoder,
    pairs: Mapping[str, Labelled],
    tasks: Sequence[Task],
    batch_size: int,
    spoilt: Mapping[str, int],
) -> tuple[dict[str, Side], dict[str, Any]]:
    """The sides by split, with the frozen encoder's features; and what cannot be read or is not finite, by split."""
    ends = [0, *np.cumsum([len(part) for part in pairs.values()]).tolist()]
    all_targets = np.stack([task.targets for task in tasks], 1) if tasks else np.zeros((ends[-1], 0), dtype=np.int64)
    sides, skipped, non_finite = {}, {}, {}
    for (split, part), (start, stop) in zip(pairs.items(), pairwise(ends), strict=True):
        with reader.accelerator.autocast():
            everything = reader.data(part, np.ones(len(part), dtype=bool), seed=0)
            features, read, skipped[split] = reader.outputs(encoder, part, everything, batch_size)
        usable: Chosen = np.asarray(np.isfinite(features).all(1))
        bad = {c: np.flatnonzero(read & ~usable & part.of([c])) for c in part.clients}
        broken = {client: {"image": [part.keys[i] for i in rows]} for client, rows in bad.items() if len(rows)}
        if spoilt or broken:
            non_finite[split] = {"weights": dict(spoilt), "pairs": broken}
        sides[split] = Side(part, all_targets[start:stop], features, usable)
    return sides, {"skipped": skipped, "non_finite": non_finite}


def told_apart(
    tasks: Sequence[Task],
    sides: Mapping[str, Side],
    refused: dict[str, str],
    splits: Sequence[str],
    inside: Sequence[str],
) -> tuple[list[Task], dict[str, Side]]:
    """The labels of which two classes can be trained on and measured, and the sides with their targets alone; `refused` is
    told the others."""
    kept = []
    for k, task in enumerate(tasks):
        columns = []
        for split in splits:
            side = sides[split]
            columns.append(side.targets[side.labelled(inside), k])
        if all(len(np.unique(column[column >= 0])) > 1 for column in columns):
            kept.append(k)
        else:
            refused[task.name] = "only one of its classes occurs in the training or the measured split"
    chosen = {name: Side(s.pairs, s.targets[:, kept], s.features, s.usable) for name, s in sides.items()}
    return [tasks[k] for k in kept], chosen
