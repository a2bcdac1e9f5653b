"""Transfer as the paper measures it: the image encoder fine-tuned on shares of the labels, its frozen features or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from feddra_ds.config.schema import AugmentConfig, DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.evaluation.classifier import ImageEncoder
from feddra_ds.evaluation.fit import accelerated
from feddra_ds.evaluation.gallery import open_split
from feddra_ds.evaluation.labelled import Reader, find_labelled
from feddra_ds.evaluation.labels import find_tasks
from feddra_ds.evaluation.models import Models, open_models
from feddra_ds.evaluation.sides import look, told_apart
from feddra_ds.evaluation.transfer import Options, Table

MODES = ("linear", "full")


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
    strength: float = 1.0,
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
    options = Options(batch_size, epochs, patience, lr, strength, weight_decay, class_weights == "balanced")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"--modes: {', '.join(unknown)} is none; there are {' and '.join(MODES)}")
    if val_split == train_split:
        raise ValueError(f"--val-split: {val_split} is trained on; give another split, which says when to stop")
    opened = _open(path, None if data is None else str(data), clients, train_split, val_split, split)
    about: dict[str, Any] = opened.about | {"modes": [m for m in MODES if m in modes]}
    about |= {"fractions": sorted(set(fractions)), "seeds": [seed + r for r in range(repeats)]}
    about |= {"held_out": opened.held_out, "class_weights": class_weights, "batch_size": batch_size}
    with accelerated(device, mixed_precision) as accelerator, DecodePool(num_workers) as pool:
        if batch_size % accelerator.num_processes:
            raise ValueError(
                f"--batch-size: {batch_size} pairs cannot be shared by {accelerator.num_processes} processes"
            )
        about |= {"processes": accelerator.num_processes, "mixed_precision": str(accelerator.mixed_precision)}
        reader = _reader(opened, accelerator, pool)
        encoder = ImageEncoder(opened.models.of("")[0]).to(accelerator.device)
        encoder.freeze_unused(reader.processor.image_size)
        pairs = {
            name: find_labelled(opened.dataset, some, name, max_pairs, seed) for name, some in opened.whose.items()
        }
        tasks, refused = find_tasks([info for part in pairs.values() for info in part.infos], label_keys)
        sides, found = look(reader, encoder, pairs, tasks, batch_size, opened.models.non_finite)
        tasks, sides = told_apart(tasks, sides, refused, (train_split, opened.measured), opened.inside)
        if not tasks and not found["non_finite"]:
            reasons = "".join(f"; {label}: {why}" for label, why in refused.items())
            raise ValueError(f"--label-key: {opened.root} has no label to predict{reasons}")
        train, val, on = (sides[name] for name in (train_split, val_split, opened.measured))
        if tasks and not val.labelled(opened.inside).any():
            raise ValueError(f"--val-split: no pair of {val_split} has a label, so nothing says when to stop")
        table = Table(reader, encoder, tasks, train, val, on, opened.inside, options)
        rows = table.transfer(about["modes"], about["fractions"], about["seeds"]) if tasks else {}
    labels = {
        one.name: {"classes": len(one.classes), "train": train.counts(k), "measured": on.counts(k)}
        for k, one in enumerate(tasks)
    }
    return about | found | {"labels": labels, "labels_left_out": refused, "transfer": rows}


@dataclass(frozen=True)
class _Opened:
    """What is fine-tuned and on what. inside, held_out: the dataset's clients that are trained on, and the others. measured:
    the split of the table."""

    models: Models
    root: str
    dataset: Dataset
    inside: list[str]
    held_out: list[str]
    train_split: str
    val_split: str
    measured: str

    @property
    def whose(self) -> dict[str, list[str]]:
        """split → the clients whose pairs of it are looked at."""
        return {self.train_split: self.inside, self.val_split: self.inside} | {self.measured: self.dataset.client_ids}

    @property
    def about(self) -> dict[str, Any]:
        of = {"model": str(self.models.source), "round": self.models.round, "data": self.root}
        return of | {"train_split": self.train_split, "val_split": self.val_split, "split": self.measured}


def _open(
    path: str | Path,
    data: str | None,
    clients: Sequence[str] | None,
    train_split: str,
    val_split: str,
    split: str | None,
) -> _Opened:
    models = open_models(path, "cpu")
    if not models.shared:
        raise ValueError(f"{models.path}: each client has a model of its own, and this needs one; give {models.source}")
    root = models.data_root(data)
    dataset = open_split(models, root, split or val_split, clients)
    held_out = models.held_out(dataset, dataset.client_ids)
    inside = [c for c in dataset.client_ids if c not in held_out]
    measured = split or ("test" if any(dataset.num_samples(c, "test") for c in inside) else val_split)
    return _Opened(models, root, dataset, inside, held_out, train_split, val_split, measured)


def _reader(opened: _Opened, accelerator: Accelerator, pool: DecodePool) -> Reader:
    """Augmentation and tolerance are those of the run, where there is one."""
    run = opened.models.run
    augment = (run.get("data.augment") if run is not None else None) or {}
    max_bad = run.get("data.max_bad_fraction") if run is not None else None
    max_bad = DataConfig().max_bad_fraction if max_bad is None else max_bad
    processor = opened.models.of("")[1]
    return Reader(opened.dataset, processor, AugmentConfig(**augment), max_bad, pool, accelerator)
