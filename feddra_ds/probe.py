"""`feddra-ds probe`: how much a linear classifier on frozen image features gets out of 1, 10 and 100 % of the labels.

Legend: n pairs, F features, C classes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data.console import next_step, print_table, track
from .data.shards import open_dataset
from .evaluate_command import add_model_arguments, positive, split_ids
from .inference import Gallery, embed_clients, open_models, open_split
from .labels import Task, find_tasks, measure
from .measures import POOLED

FEATURES = ("backbone", "embedding")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `probe`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--label-key",
        action="append",
        metavar="K",
        help="label of the samples' json to predict; may be given several times (default: every label)",
    )
    parser.add_argument(
        "--fractions",
        default="0.01,0.1,1.0",
        metavar="F,F",
        help="shares of the training labels that are used, at least one of each class (default: 0.01,0.1,1.0)",
    )
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="backbone",
        help="backbone: what goes into the image head; embedding: what comes out of it (default: backbone)",
    )
    parser.add_argument("--train-split", default="train", metavar="NAME", help="split to train on (default: train)")
    parser.add_argument("--split", default="val", metavar="NAME", help="split to measure on (default: val)")
    parser.add_argument(
        "--max-pairs",
        type=positive,
        default=20000,
        metavar="N",
        help="most pairs of a client and split (default: 20000)",
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="draws of the labels where not all are used (default: 5)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="C",
        help="inverse of the L2 penalty, scikit-learn's C (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises ValueError for what cannot be probed."""
    fractions = parse_fractions(args.fractions)
    if args.strength <= 0:
        raise ValueError(f"--strength: must be above 0, got {args.strength:g}")
    models = open_models(args.model, args.device)
    if not models.shared:
        raise ValueError(
            f"{models.path}: each client has a model of its own, and a probe needs one; give {models.source}"
        )
    root = models.data_root(args.data)
    dataset = open_split(root, args.split, split_ids(args.clients), models.trained_on(open_dataset(root)))
    parts: dict[str, dict[str, Gallery]] = {}
    for split in (args.train_split, args.split):
        parts[split] = embed_clients(
            models,
            dataset,
            dataset.client_ids,
            split,
            max_pairs=args.max_pairs,
            batch_size=args.batch_size,
            seed=args.seed,
            num_workers=args.num_workers,
            features=args.features == "backbone",
        )
    train, val = parts[args.train_split], parts[args.split]
    trained = models.trained_on(dataset)
    held_out = [c for c in dataset.client_ids if (c in dataset.held_out if trained is None else c not in trained)]
    if not any(c in train for c in dataset.client_ids if c not in held_out):
        raise ValueError(
            f"--train-split: none of {', '.join(dataset.client_ids)} has a {args.train_split} split to train on"
        )
    result: dict[str, Any] = {
        "model": str(models.source),
        "data": root,
        "features": args.features,
        "fractions": fractions,
    }
    result |= probe_all(
        train, val, held_out, args.label_key, fractions, repeats=args.repeats, seed=args.seed, strength=args.strength
    )
    if not result["labels"]:
        reasons = "".join(f"; {label}: {why}" for label, why in result["labels_left_out"].items())
        raise ValueError(f"--label-key: {root} has no label to predict{reasons}")
    if args.json:
        print(json.dumps(result))
    else:
        show(result, str(models.path))
    return 0


def parse_fractions(text: str) -> list[float]:
    """`0.01,0.1,1.0` as floats. Raises ValueError for what is no share."""
    out = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise ValueError(f"--fractions: {part.strip()!r} is no number; give shares such as 0.01,0.1,1.0") from None
        if not 0 < value <= 1:
            raise ValueError(f"--fractions: {value:g} is no share; each must be above 0 and at most 1")
        out.append(value)
    return sorted(set(out))


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
    return Side(list(part), owner, np.concatenate(features), targets)


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
    """A stratified share of the pairs, at least one of each class that occurs."""
    chosen = []
    for c in np.unique(targets):
        members = np.flatnonzero(targets == c)
        chosen.append(rng.permutation(members)[: max(1, round(fraction * len(members)))])
    index = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)
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
        scores = np.full((len(targets), len(task.classes)), margin.min() - 1.0)  # a class never seen comes last
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


def show(result: dict[str, Any], model: str) -> None:
    """A table per label: rows are clients, columns the shares of the labels."""
    for label, about in result["labels"].items():
        clients = [c for c in about["train"] if about["val"][c]]
        heads = [f"{100 * float(f):g} %" for f in about["pooled_probe"]]
        rows: list[list[object]] = []
        for c in clients:
            name = f"{c} (held out)" if c in result["held_out"] else c
            own = [_cell(m.get(c)) for m in about["own_probe"].values()]
            rows.append(
                [name, about["train"][c], about["val"][c], *[_cell(m[c]) for m in about["pooled_probe"].values()], *own]
            )
        total = [sum(about[s][c] for c in clients if c not in result["held_out"]) for s in ("train", "val")]
        rows.append(["all", *total, *[_cell(m[POOLED]) for m in about["pooled_probe"].values()], *[""] * len(heads)])
        used = ", ".join(
            f"{m['labels']} labels at {h}" for m, h in zip(about["pooled_probe"].values(), heads, strict=True)
        )
        columns = ["client", "train", "val", *[f"pooled {h}" for h in heads], *[f"own {h}" for h in heads]]
        print_table(
            f"{label}: AUROC of a linear probe on {result['features']} features ({used})", columns, rows, total=True
        )
        print()
    print("pooled: trained on the labels of all clients that are not held out; own: on the client's own labels alone")
    for label, reason in result["labels_left_out"].items():
        print(f"{label}: left out, {reason}")
    print()
    next_step(
        f"feddra-ds probe {model} --data {result['data']} --features "
        + ("embedding   # after the head" if result["features"] == "backbone" else "backbone   # before the head"),
        f"feddra-ds evaluate {model} --data {result['data']}",
    )


def _cell(measured: dict[str, float] | None) -> str:
    if measured is None:
        return "–"
    spread = f" ± {measured['auroc_sd']:.2f}" if measured["auroc_sd"] else ""
    return f"{measured['auroc']:.3f}{spread}"
