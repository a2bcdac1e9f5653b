"""The transfer table: classifiers on shares of the labels, on frozen features or with the whole encoder, and what they are worth.

Legend: n pairs, F features, K labels, C classes of all labels together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from feddra_ds.common.console import track
from feddra_ds.data.loading.order import Position
from feddra_ds.evaluation.classifier import Classifier, ImageEncoder, Loss, loss_of
from feddra_ds.evaluation.fit import Schedule, fit, fit_layer
from feddra_ds.evaluation.labelled import Chosen, Reader
from feddra_ds.evaluation.labels import Task, draw_labels
from feddra_ds.evaluation.sides import Side
from feddra_ds.evaluation.verdict import POOLED
from feddra_ds.metrics.classification import measure
from feddra_ds.metrics.intervals import t_interval

MEASURED = ("auroc", "accuracy", "balanced_accuracy")
MIN_STEPS = 10  # between two looks at val, where a pass over the labels has fewer

Scores = dict[str, dict[str, dict[str, float] | None]]  # label → client or POOLED → what `measure` says


@dataclass(frozen=True)
class Options:
    """How classifiers are fitted. lr, weight_decay: AdamW's, of full fine-tuning; strength: scikit-learn's C, of the layer
    on frozen features."""

    batch_size: int
    epochs: int
    patience: int
    lr: float
    strength: float
    weight_decay: float
    balanced: bool

    def __post_init__(self) -> None:
        for name in ("lr", "strength"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name}: must be above 0, got {getattr(self, name):g}")
        if self.weight_decay < 0:
            raise ValueError(f"--weight-decay: must be at least 0, got {self.weight_decay:g}")


@dataclass(frozen=True)
class Table:
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
            start, taken = self.linear(chosen)
            for mode in modes:
                if mode == "linear":
                    logits: NDArray[Any] = self.logits(start)
                else:
                    logits, taken = self.full(chosen, seed, start)
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

    def schedule(self, num: int) -> tuple[Schedule, int]:
        """For `num` labelled pairs, and the size of a batch: the largest power of two where they are fewer than a batch."""
        size = self.options.batch_size if num >= self.options.batch_size else 1 << (num.bit_length() - 1)
        steps = max(num // size, MIN_STEPS)
        about = self.options
        return Schedule(about.lr, about.weight_decay, steps, about.epochs, about.patience), size

    def ranks(self, batch_size: int) -> int:
        """Processes that share a batch; 1 where it is too small, and each does all of it."""
        num = self.accelerator.num_processes
        return num if batch_size % num == 0 else 1

    def standardised(self, side: Side) -> Tensor:
        """(n, F) float64, by mean and deviation of the training pairs' features, with labels or without."""
        mean, std = self.moments
        return (torch.from_numpy(side.features).double() - mean) / std

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (F,) of the features."""
        known = self.train.features[self.train.usable & self.train.pairs.of(self.inside)].astype(np.float64)
        std = known.std(0)
        std = np.where(std > 1e-6 * max(float(std.max()), 1e-12), std, 1.0)
        return torch.from_numpy(known.mean(0)), torch.from_numpy(std)

    def linear(self, chosen: NDArray[np.int64]) -> tuple[nn.Linear, int]:
        """A layer on the standardised features of the `chosen` training pairs, and the most iterations of any label.

        What a label's logits are depends on no other label, so each is fitted, and stopped, by itself. Every process does all of
        this, as it costs nothing beside the features.
        """
        x, rows = self.standardised(self.train)[chosen], self.val.labelled(self.inside)
        val_x, parts, taken = self.standardised(self.val)[rows], [], []
        for k, task in enumerate(self.tasks):
            targets, val_targets = self.train.targets[chosen, k : k + 1], self.val.targets[rows, k : k + 1]
            layer = nn.Linear(x.shape[1], len(task.classes), dtype=torch.float64)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            loss = loss_of([task], targets, self.options.balanced)
            taken.append(self.fit_layer(layer, loss, (x, targets), (val_x, val_targets)))
            parts.append(layer)
        out = nn.Linear(x.shape[1], sum(len(task.classes) for task in self.tasks), dtype=torch.float64)
        with torch.no_grad():
            out.weight.copy_(torch.cat([part.weight for part in parts]))
            out.bias.copy_(torch.cat([part.bias for part in parts]))
        return out, max(taken)

    def fit_layer(
        self,
        layer: nn.Linear,
        loss: Loss,
        pairs: tuple[Tensor, NDArray[np.int64]],
        val: tuple[Tensor, NDArray[np.int64]],
    ) -> int:
        """Fit one label's layer on features and targets; where val has none of the label, to the least training loss."""
        y, val_y = torch.from_numpy(pairs[1]), torch.from_numpy(val[1])
        fitted = lambda: loss(layer(pairs[0]), y) + loss.penalty(layer.weight, self.options.strength)
        looked = (lambda: loss(layer(val[0]), val_y)) if (val_y >= 0).any() else fitted
        return fit_layer(layer, fitted, lambda: float(looked().detach()), self.options.patience)

    @torch.no_grad()
    def logits(self, layer: nn.Linear) -> NDArray[np.float64]:
        """(n, C) of the measured pairs by a layer on their features."""
        return layer(self.standardised(self.measured)).numpy()

    def full(self, chosen: NDArray[np.int64], seed: int, start: nn.Linear) -> tuple[NDArray[np.float32], int]:
        """(n, C) logits of the measured pairs by the whole encoder, fine-tuned from a linear classifier; steps taken."""
        model = Classifier(self.encoder, *self.moments, start).to(self.accelerator.device)
        loss = loss_of(self.tasks, self.train.targets[chosen], self.options.balanced)
        schedule, size = self.schedule(len(chosen))
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

    def tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.accelerator.device)

    def scored(self, logits: NDArray[Any]) -> Scores:
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
