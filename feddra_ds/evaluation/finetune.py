"""Transfer as the paper measures it: the image encoder fine-tuned on shares of the labels, its frozen features or all of it.

Legend: n pairs, F features, K labels, C classes of all labels together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from feddra_ds.common.console import track
from feddra_ds.config.schema import AugmentConfig, DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.loading.order import Order, Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.evaluation.classifier import Classifier, ImageEncoder, Loss, loss_of
from feddra_ds.evaluation.fit import Schedule, accelerated, fit
from feddra_ds.evaluation.gallery import open_split
from feddra_ds.evaluation.labelled import Chosen, Labelled, Reader, find_labelled
from feddra_ds.evaluation.labels import Task, draw_labels, find_tasks
from feddra_ds.evaluation.models import Models, open_models
from feddra_ds.evaluation.verdict import POOLED
from feddra_ds.metrics.classification import measure
from feddra_ds.metrics.intervals import t_interval

MODES = ("linear", "full")
MEASURED = ("auroc", "accuracy", "balanced_accuracy")
MIN_STEPS = 10  # between two looks at val, where a pass over the labels has fewer
_CHUNK = 4096  # features at a time

Scores = dict[str, dict[str, dict[str, float] | None]]  # label → client or POOLED → what `measure` says


@dataclass(frozen=True)
class Options:
    """How classifiers are fitted. lr: of full fine-tuning; linear_lr: of the layer on frozen features."""

    batch_size: int
    epochs: int
    patience: int
    lr: float
    linear_lr: float
    weight_decay: float
    balanced: bool

    def __post_init__(self) -> None:
        for name in ("lr", "linear_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')}: must be above 0, got {getattr(self, name):g}")
        if self.weight_decay < 0:
            raise ValueError(f"--weight-decay: must be at least 0, got {self.weight_decay:g}")


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


def finetune(
    path: str | Path,
    *,
    data: str | Path | None = None,
    clients: Sequence[str] | None = None,
    label_keys: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    repeats: int = 3,
    train_split: str = "train",
    val_split: str = "val",
    split: str | None = None,
    max_pairs: int | None = 20000,
    epochs: int = 50,
    patience: int = 10,
    lr: float = 1e-4,
    linear_lr: float = 1e-2,
    weight_decay: float = 1e-2,
    class_weights: str = "balanced",
    mixed_precision: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """The transfer table of a trained model: what `feddra-ds finetune --json` prints, as a dict. Collective, over the processes
    that `accelerate launch` or torchrun started; all get the same.

    path, data, clients, max_pairs, device, num_workers: as `evaluate` takes them. label_keys: labels to predict together (None:
    every one). modes: `linear`, a layer on the frozen features; `full`, from there all of the image encoder. fractions: shares
    of the training labels. repeats: draws of the labels, by seed, seed + 1, …. val_split: says when to stop; split: is measured
    (None: test where a client that was trained on has it, else val_split). epochs: most passes over the labels, patience: so
    many without a better val loss end it. class_weights: balanced or none. mixed_precision: no, bf16, fp16, None for
    accelerate's own. batch_size: over all processes.

    docs/json_output.md says what is in it. Held-out clients are measured, never trained on. Writes nothing. Raises ValueError,
    whose message names the option, and DataError for data that cannot be read.
    """
    options = Options(batch_size, epochs, patience, lr, linear_lr, weight_decay, class_weights == "balanced")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"--modes: {', '.join(unknown)} is none; there are {' and '.join(MODES)}")
    if val_split == train_split:
        raise ValueError(f"--val-split: {val_split} is trained on; give another split, which says when to stop")
    models = open_models(path, "cpu")
    if not models.shared:
        raise ValueError(f"{models.path}: each client has a model of its own, and this needs one; give {models.source}")
    root = models.data_root(None if data is None else str(data))
    dataset = open_split(models, root, split or val_split, clients)
    held_out = models.held_out(dataset, dataset.client_ids)
    inside = [c for c in dataset.client_ids if c not in held_out]
    measured = split or ("test" if any(dataset.num_samples(c, "test") for c in inside) else val_split)
    about: dict[str, Any] = {
        "model": str(models.source),
        "round": models.round,
        "data": root,
        "train_split": train_split,
    }
    about |= {"val_split": val_split, "split": measured, "modes": [m for m in MODES if m in modes]}
    about |= {"fractions": sorted(set(fractions)), "seeds": [seed + r for r in range(repeats)], "held_out": held_out}
    about |= {"class_weights": class_weights, "batch_size": batch_size}
    with accelerated(device, mixed_precision) as accelerator, DecodePool(num_workers) as pool:
        if batch_size % accelerator.num_processes:
            raise ValueError(
                f"--batch-size: {batch_size} pairs cannot be shared by {accelerator.num_processes} processes"
            )
        about |= {"processes": accelerator.num_processes, "mixed_precision": str(accelerator.mixed_precision)}
        reader = _reader(models, dataset, accelerator, pool)
        encoder = ImageEncoder(models.of("")[0]).to(accelerator.device)
        encoder.freeze_unused(reader.processor.image_size)
        whose = {train_split: inside, val_split: inside} | {measured: dataset.client_ids}
        pairs = {name: find_labelled(dataset, some, name, max_pairs, seed) for name, some in whose.items()}
        tasks, refused = find_tasks([info for part in pairs.values() for info in part.infos], label_keys)
        sides, found = _look(reader, encoder, pairs, tasks, batch_size, models.non_finite)
        tasks, sides = _told_apart(tasks, sides, refused, (train_split, measured), inside)
        if not tasks and not found["non_finite"]:
            reasons = "".join(f"; {label}: {why}" for label, why in refused.items())
            raise ValueError(f"--label-key: {root} has no label to predict{reasons}")
        train, val, on = (sides[name] for name in (train_split, val_split, measured))
        if tasks and not val.labelled(inside).any():
            raise ValueError(f"--val-split: no pair of {val_split} has a label, so nothing says when to stop")
        table = _Table(reader, encoder, tasks, train, val, on, inside, options)
        rows = table.transfer(about["modes"], about["fractions"], about["seeds"]) if tasks else {}
    labels = {
        task.name: {"classes": len(task.classes), "train": _counts(train, k), "measured": _counts(on, k)}
        for k, task in enumerate(tasks)
    }
    return about | found | {"labels": labels, "labels_left_out": refused, "transfer": rows}


def _reader(models: Models, dataset: Dataset, accelerator: Accelerator, pool: DecodePool) -> Reader:
    """Augmentation and tolerance are those of the run, where there is one."""
    run = models.run
    augment = (run.get("data.augment") if run is not None else None) or {}
    max_bad = run.get("data.max_bad_fraction") if run is not None else None
    max_bad = DataConfig().max_bad_fraction if max_bad is None else max_bad
    return Reader(dataset, models.of("")[1], AugmentConfig(**augment), max_bad, pool, accelerator)


def _look(
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


def _told_apart(
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


def _counts(side: Side, k: int) -> dict[str, int]:
    """Usable pairs with label k by client."""
    known = side.usable & (side.targets[:, k] >= 0)
    return {client: int((known & side.pairs.of([client])).sum()) for client in side.pairs.clients}


@dataclass(frozen=True)
class _Table:
    """Fits and measures the classifiers of the transfer table. inside: the clients that are trained on."""

    reader: Reader
    encoder: ImageEncoder
    tasks: list[Task]
    train: Side
    val: Side
    measured: Side
    inside: list[str]
    options: Options

    @property
    def accelerator(self) -> Accelerator:
        return self.reader.accelerator

    def transfer(self, modes: Sequence[str], fractions: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
        """mode → share → its labels, steps and measures over the seeds."""
        scores: dict[tuple[str, float], list[Scores]] = {}
        steps: dict[tuple[str, float], list[int]] = {}
        sizes: dict[float, list[int]] = {}
        candidates = np.flatnonzero(self.train.labelled(self.inside))
        plan = [(fraction, seed) for fraction in fractions for seed in seeds]
        shown = track(plan, len(plan), "fine-tuning") if self.accelerator.is_main_process else iter(plan)
        for fraction, seed in shown:
            draw = draw_labels(self.train.targets[candidates], fraction, np.random.default_rng(seed))
            chosen = candidates[draw]
            sizes.setdefault(fraction, []).append(len(chosen))
            loss = loss_of(self.tasks, self.train.targets[chosen], self.options.balanced)
            start, taken = self.linear(chosen, loss, seed)
            for mode in modes:
                if mode == "linear":
                    logits = self.logits_of_features(start, self.measured.features)
                else:
                    logits, taken = self.full(chosen, loss, seed, start)
                scores.setdefault((mode, fraction), []).append(self.scored(logits))
                steps.setdefault((mode, fraction), []).append(taken)
            self.accelerator.free_memory()
        return {
            mode: {
                f"{fraction:g}": {"labels": sizes[fraction], "steps": steps[mode, fraction]}
                | self.summary(scores[mode, fraction])
                for fraction in fractions
            }
            for mode in modes
        }

    def schedule(self, num: int, lr: float) -> tuple[Schedule, int]:
        """For `num` labelled pairs, and the size of a batch: the largest power of two where they are fewer than a batch."""
        size = self.options.batch_size if num >= self.options.batch_size else 1 << (num.bit_length() - 1)
        steps = max(num // size, MIN_STEPS)
        return Schedule(lr, self.options.weight_decay, steps, self.options.epochs, self.options.patience), size

    def ranks(self, batch_size: int) -> int:
        """Processes that share a batch; 1 where it is too small, and each does all of it."""
        num = self.accelerator.num_processes
        return num if batch_size % num == 0 else 1

    def new(self, encoder: ImageEncoder | None, start: Classifier | None = None) -> Classifier:
        """A classifier of features that are standardised by the usable training pairs', with labels or without."""
        known = self.train.features[self.train.usable & self.train.pairs.of(self.inside)].astype(np.float64)
        std = known.std(0)
        std = np.where(std > 1e-6 * max(float(std.max()), 1e-12), std, 1.0)
        num_outputs = sum(len(task.classes) for task in self.tasks)
        mean = known.mean(0)
        model = Classifier(encoder, mean.astype(np.float32), std.astype(np.float32), num_outputs, start)
        return model.to(self.accelerator.device)

    def linear(self, chosen: NDArray[np.int64], loss: Loss, seed: int) -> tuple[Classifier, int]:
        """A layer on the frozen features of the `chosen` training pairs, and the steps that it took."""
        model = self.new(None)
        schedule, size = self.schedule(len(chosen), self.options.linear_lr)
        ranks = self.ranks(size)
        part = slice(0, size) if ranks == 1 else self.share(size)
        order = Order(seed, "features", len(chosen), size)
        features, targets = self.train.features[chosen], self.train.targets[chosen]

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            place = Position()
            while True:
                rows = order.batch(place)[part, 1]
                yield self.tensor(features[rows]), self.tensor(targets[rows])
                place = order.advance(place, 1)

        rows = self.val.labelled(self.inside)
        val_features, val_targets = self.val.features[rows], torch.from_numpy(self.val.targets[rows])

        def val_loss(module: nn.Module) -> float:
            return float(loss(torch.from_numpy(self.logits_of_features(module, val_features)), val_targets))

        return model, fit(self.accelerator, model, batches(), loss, val_loss, schedule, seed)

    def full(
        self, chosen: NDArray[np.int64], loss: Loss, seed: int, start: Classifier
    ) -> tuple[NDArray[np.float32], int]:
        """(n, C) logits of the measured pairs by the whole encoder, fine-tuned from a linear classifier; steps taken."""
        model = self.new(self.encoder, start)
        schedule, size = self.schedule(len(chosen), self.options.lr)
        pairs, mask = self.train.pairs, np.zeros(len(self.train.pairs), dtype=bool)
        mask[chosen] = True
        data = self.reader.data(pairs, mask, seed=seed, batch_size=size, num_ranks=self.ranks(size))
        place = {name: i for i, name in enumerate(pairs.names)}

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in data.batches(Position(), schedule.steps * schedule.checks):
                rows = [place[name] for name in batch.keys]
                yield batch.to(self.accelerator.device).pixel_values, self.tensor(self.train.targets[rows])

        rows = self.val.labelled(self.inside)
        val_targets, val_data = torch.from_numpy(self.val.targets[rows]), self.reader.data(self.val.pairs, rows, seed=0)

        def val_loss(module: nn.Module) -> float:
            logits, _, _ = self.reader.outputs(module, self.val.pairs, val_data, self.options.batch_size)
            return float(loss(torch.from_numpy(logits[rows]), val_targets))

        steps = fit(self.accelerator, model, batches(), loss, val_loss, schedule, seed)
        measured = self.reader.data(self.measured.pairs, self.measured.usable, seed=0)
        return self.reader.outputs(model, self.measured.pairs, measured, self.options.batch_size)[0], steps

    def share(self, size: int) -> slice:
        """This process's part of a batch."""
        each, rank = size // self.accelerator.num_processes, self.accelerator.process_index
        return slice(rank * each, (rank + 1) * each)

    def tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.accelerator.device)

    @torch.no_grad()
    def logits_of_features(self, model: nn.Module, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, C) for features (n, F)."""
        model.eval()
        parts = [features[i : i + _CHUNK] for i in range(0, len(features), _CHUNK)]
        return np.concatenate([model(self.tensor(part)).float().cpu().numpy() for part in parts])

    def scored(self, logits: NDArray[np.float32]) -> Scores:
        """What the logits (n, C) of the measured pairs are worth: by label, of all clients that are trained on and each one."""
        side, out = self.measured, {}
        ends = np.cumsum([len(task.classes) for task in self.tasks])[:-1]
        for k, (task, part) in enumerate(
            zip(self.tasks, np.split(logits.astype(np.float64), ends, axis=1), strict=True)
        ):
            targets = np.where(side.usable, side.targets[:, k], -1)
            groups = {POOLED: self.inside} | {client: [client] for client in side.pairs.clients}
            out[task.name] = {name: _measured(targets, part, side.pairs.of(whose)) for name, whose in groups.items()}
        return out

    def summary(self, scores: Sequence[Scores]) -> dict[str, Any]:
        """Means over the seeds with intervals: of the labels' mean, of each label, of each client's mean over its labels."""
        labels = [task.name for task in self.tasks]
        by_label = {label: _over_seeds([one[label][POOLED] for one in scores]) for label in labels}
        mean = _over_seeds([_mean([one[label][POOLED] for label in labels]) for one in scores])
        clients = {
            c: [_mean([one[label][c] for label in labels]) for one in scores] for c in self.measured.pairs.clients
        }
        by_client = {client: _over_seeds(values) for client, values in clients.items()}
        return {"mean": mean, "by_label": by_label, "by_client": by_client}


def _measured(targets: NDArray[np.int64], scores: NDArray[np.float64], chosen: Chosen) -> dict[str, float] | None:
    return measure(targets[chosen], scores[chosen]) if (targets[chosen] >= 0).any() else None


def _mean(measured: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    known = [one for one in measured if one is not None]
    return {key: float(np.mean([one[key] for one in known])) for key in MEASURED} if known else None


def _over_seeds(measured: Sequence[dict[str, float] | None]) -> dict[str, Any] | None:
    """{metric: {mean, low, high, values}}: Student's 95 % interval, within what the metric can be."""
    known = [one for one in measured if one is not None]
    if not known:
        return None
    out = {}
    for key in MEASURED:
        values = [one[key] for one in known]
        told = t_interval(values)
        low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (told.low, told.high))
        out[key] = {"mean": told.mean, "low": low, "high": high, "values": values}
    return out
