"""Linear probes: a classifier on frozen image features, on shares of the labels.

Legend: n pairs, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from feddra_ds.common.console import track
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.gallery import Gallery, embed_clients, open_split
from feddra_ds.evaluation.labels import Task, draw_labels, find_tasks
from feddra_ds.evaluation.models import open_models
from feddra_ds.evaluation.verdict import POOLED
from feddra_ds.metrics.classification import measure


@dataclass(frozen=True)
class Side:
    """Features (n, F) and targets (n,) of one split over several clients; `client` (n,) indexes `clients`."""

    clients: list[str]
    client: NDArray[np.int64]
    features: NDArray[np.float32]
    targets: NDArray[np.int64]

    def of(self, keep: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and targets of the labelled pairs where `keep` (n,) is true."""
        chosen = keep & (self.targets >= 0)
        return self.features[chosen], self.targets[chosen]

    def is_in(self, clients: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) whether the pair belongs to one of these clients."""
        return np.isin(self.client, [self.clients.index(c) for c in clients if c in self.clients])


def probe(
    path: str | Path,
    *,
    data: str | Path | None = None,
    clients: Sequence[str] | None = None,
    label_keys: Sequence[str] | None = None,
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    features: Literal["backbone", "embedding"] = "backbone",
    train_split: str = "train",
    split: str = "val",
    max_pairs: int | None = 20000,
    repeats: int = 5,
    strength: float = 1.0,
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Linear probes of a trained model: what `feddra-ds probe --json` prints, as a dict.

    path, data, clients, device, max_pairs, num_workers: as `evaluate` takes them. label_keys: labels to predict (None:
    every one). fractions: shares of the training labels. features: what goes into the image head, or what comes out of
    it. repeats: draws of the labels where not all are used. strength: inverse of the L2 penalty. Pairs whose features are
    not finite are left out, and `non_finite` of the result names them. Raises ValueError for what cannot be probed.
    """
    if strength <= 0:
        raise ValueError(f"--strength: must be above 0, got {strength:g}")
    models = open_models(path, device)
    if not models.shared:
        raise ValueError(
            f"{models.path}: each client has a model of its own, and a probe needs one; give {models.source}"
        )
    root = models.data_root(None if data is None else str(data))
    dataset = open_split(models, root, split, clients)
    train, val = (
        embed_clients(
            models,
            dataset,
            dataset.client_ids,
            part,
            max_pairs=max_pairs,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            features=features == "backbone",
        )
        for part in (train_split, split)
    )
    spoilt = {name: finite.of_evaluation(models, part) for name, part in ((train_split, train), (split, val))}
    spoilt = {name: found for name, found in spoilt.items() if found}
    held_out = models.held_out(dataset, dataset.client_ids)
    if not any(c in train for c in dataset.client_ids if c not in held_out):
        raise ValueError(
            f"--train-split: none of {', '.join(dataset.client_ids)} has a {train_split} split to train on"
        )
    about: dict[str, Any] = {
        "model": str(models.source),
        "data": root,
        "features": features,
        "fractions": list(fractions),
    }
    about["non_finite"] = spoilt
    found = probe_all(train, val, held_out, label_keys, fractions, repeats=repeats, seed=seed, strength=strength)
    if not found["labels"] and not spoilt:
        reasons = "".join(f"; {label}: {why}" for label, why in found["labels_left_out"].items())
        raise ValueError(f"--label-key: {root} has no label to predict{reasons}")
    return about | found


def probe_all(
    train: dict[str, Gallery],
    val: dict[str, Gallery],
    held_out: Sequence[str],
    keys: Sequence[str] | None,
    fractions: Sequence[float],
    *,
    repeats: int,
    seed: int,
    strength: float,
) -> dict[str, Any]:
    """Probes of every label, as a JSON-ready dict. Held-out clients are measured on, never trained on."""
    infos = [[info for gallery in part.values() for info in gallery.infos] for part in (train, val)]
    tasks, refused = find_tasks([*infos[0], *infos[1]], keys)
    labels: dict[str, Any] = {}
    clients = list(dict.fromkeys([*train, *val]))
    for task in track(tasks, len(tasks), "probing"):
        sides = [
            _side(part, targets)
            for part, targets in zip((train, val), np.split(task.targets, [len(infos[0])]), strict=True)
        ]
        probed = _probe(task, sides[0], sides[1], clients, held_out, fractions, repeats, seed, strength)
        if probed is None:
            refused[task.name] = "only one of its classes occurs in the training or the measured split"
        else:
            labels[task.name] = probed
    return {"labels": labels, "labels_left_out": refused, "held_out": list(held_out)}


def _side(part: dict[str, Gallery], targets: NDArray[np.int64]) -> Side:
    features = [g.features if g.features.shape[1] else g.image for g in part.values()]
    owner = np.repeat(np.arange(len(part)), [len(g) for g in part.values()])
    together = np.concatenate(features)
    finite_targets = np.where(np.isfinite(together).all(1), targets, -1)
    return Side(list(part), owner, together, finite_targets)


def _probe(
    task: Task,
    train: Side,
    val: Side,
    clients: Sequence[str],
    held_out: Sequence[str],
    fractions: Sequence[float],
    repeats: int,
    seed: int,
    strength: float,
) -> dict[str, Any] | None:
    insiders = [c for c in clients if c not in held_out]
    inside = train.is_in(insiders)
    if len(np.unique(train.of(inside)[1])) < 2 or len(np.unique(val.of(val.is_in(clients))[1])) < 2:
        return None
    out: dict[str, Any] = {
        "classes": len(task.classes),
        "train": {c: len(train.of(train.is_in([c]))[1]) for c in clients},
        "val": {c: len(val.of(val.is_in([c]))[1]) for c in clients},
        "pooled_probe": {},
        "own_probe": {},
    }
    for fraction in fractions:
        draws = 1 if fraction >= 1 else repeats
        pooled: list[dict[str, Any]] = []
        own: list[dict[str, Any]] = []
        for draw in range(draws):
            rng = np.random.default_rng([seed, draw])
            x, y = _subset(*train.of(inside), fraction, rng)
            pooled.append(
                {"labels": len(y)} | _scores(task, x, y, val, {POOLED: insiders} | {c: [c] for c in clients}, strength)
            )
            of_own: dict[str, Any] = {}
            for c in insiders:
                x, y = _subset(*train.of(train.is_in([c])), fraction, rng)
                of_own[c] = _scores(task, x, y, val, {c: [c]}, strength)[c] if len(np.unique(y)) > 1 else None
            own.append(of_own)
        key = f"{fraction:g}"
        out["pooled_probe"][key] = {"labels": pooled[0]["labels"]} | {
            c: _mean([p[c] for p in pooled]) for c in (POOLED, *clients)
        }
        out["own_probe"][key] = {c: _mean([o[c] for o in own]) for c in insiders}
    return out


def _subset(
    features: NDArray[np.float32], targets: NDArray[np.int64], fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    index = draw_labels(targets[:, None], fraction, rng)
    return features[index], targets[index]


def _scores(
    task: Task,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    val: Side,
    galleries: dict[str, list[str]],
    strength: float,
) -> dict[str, dict[str, float] | None]:
    """Fit on x (n, F), y (n,) and measure on the val pairs of each group of clients."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000, class_weight="balanced"))
    model.fit(x.astype(np.float64), y)
    out: dict[str, dict[str, float] | None] = {}
    for name, clients in galleries.items():
        features, targets = val.of(val.is_in(clients))
        if len(targets) == 0:
            out[name] = None
            continue
        margin = model.decision_function(features.astype(np.float64))
        margin = np.stack([-margin, margin], axis=1) if margin.ndim == 1 else margin
        scores = np.full(
            (len(targets), len(task.classes)), margin.min() - 1.0
        )  # a class that was not trained on comes last
        scores[:, model.classes_] = margin
        out[name] = measure(targets, scores)
    return out


def _mean(measured: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """Mean and standard deviation over the draws."""
    known = [m for m in measured if m is not None]
    if not known:
        return None
    out = {}
    for key in ("auroc", "balanced_accuracy"):
        out[key] = float(np.mean([m[key] for m in known]))
        out[f"{key}_sd"] = float(np.std([m[key] for m in known]))
    return out
