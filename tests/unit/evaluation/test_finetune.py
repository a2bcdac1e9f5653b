"""Fine-tuning: its loss, features and stopping are what they are said to be, and every option does what it says."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import CLIENTS, HELD_OUT, add_model, make_config, make_data, make_line, make_run
from sklearn.metrics import log_loss
from torch import Tensor, nn

from feddra_ds.evaluation.classifier import Classifier, ImageEncoder, loss_of
from feddra_ds.evaluation.finetune import finetune
from feddra_ds.evaluation.fit import Schedule, accelerated, fit
from feddra_ds.evaluation.gallery import head_inputs
from feddra_ds.evaluation.labels import Task
from feddra_ds.model.folder import load_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained model."""
    work = tmp_path_factory.mktemp("work")
    config = make_config(work / "run", make_data(work / "data"))
    add_model(work / "run" / "model", config)
    return make_run(work / "run", config, [make_line(0)])


@pytest.mark.parametrize("balanced", [True, False])
def test_the_loss_is_scikit_learns_with_class_weights(balanced: bool) -> None:
    rng = np.random.default_rng(0)
    targets = np.stack([rng.choice(2, 60, p=[0.9, 0.1]), rng.choice([-1, 0, 1, 2], 60)], 1)
    tasks = [Task("rare", ("no", "yes"), True, targets[:, 0]), Task("view", ("a", "b", "c"), False, targets[:, 1])]
    logits = torch.from_numpy(rng.normal(size=(60, 5)))
    loss = loss_of(tasks, targets, balanced)
    found = loss(logits, torch.from_numpy(targets))
    expected = []
    for column, part in zip(targets.T, logits.split([2, 3], 1), strict=True):
        known = column >= 0
        share = np.bincount(column[known])[column[known]]
        weights = 1 / share if balanced else np.ones(known.sum())
        expected.append(log_loss(column[known], part.softmax(1).numpy()[known], sample_weight=weights))
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-6)
    halves = [loss(logits[i::2], torch.from_numpy(targets[i::2])) for i in (0, 1)]
    assert float(sum(halves) / 2) == pytest.approx(float(found), abs=1e-6), "two processes' mean is the batch's"


def test_the_features_are_those_of_probe(run: Path) -> None:
    model, _ = load_pretrained(run / "model")
    encoder, pixels = ImageEncoder(model), torch.randn(2, 3, 16, 16)
    with torch.no_grad(), head_inputs(model) as seen:
        model(pixel_values=pixels)
        torch.testing.assert_close(encoder(pixels), seen[0])
    encoder.freeze_unused(16)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    encoder.idle = nn.Linear(1, 1)
    encoder.freeze_unused(16)
    assert [n for n, p in encoder.named_parameters() if not p.requires_grad] == ["idle.weight", "idle.bias"]


def test_batchnorms_keep_the_encoders_statistics() -> None:
    from feddra_ds.model.heads import BatchNorm

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dropout = BatchNorm(3), nn.Dropout()

    model = Classifier(Encoder(), np.zeros(3, np.float32), np.ones(3, np.float32), 2).train()  # type: ignore[arg-type]
    assert model.encoder.dropout.training
    assert not model.encoder.norm.training


def test_the_best_of_the_looks_at_val_is_kept() -> None:
    model = nn.Linear(1, 1)
    looks = iter([1.0, 0.5, 0.6, 0.4, 0.5, 0.6, 0.0])
    seen: list[Tensor] = []

    def val_loss(module: nn.Module) -> float:
        seen.append(module.weight.detach().clone())
        return next(looks)

    batches = repeat((torch.ones(4, 1), torch.ones(4, 1)))
    with accelerated("cpu", None) as accelerator:
        steps = fit(accelerator, model, batches, nn.functional.mse_loss, val_loss, Schedule(0.1, 0.0, 2, 9, 2), 0)
    assert (steps, len(seen)) == (6, 6), "it stopped after two looks that were no better than the third"
    assert torch.equal(model.weight, seen[3])
    assert not torch.equal(seen[3], seen[5])


def test_a_table(run: Path) -> None:
    common: dict[str, Any] = {"fractions": [0.5], "epochs": 1, "device": "cpu", "seed": 3}
    found = finetune(run, **common, repeats=2)
    assert found["split"] == "val", "no client that was trained on has a test split"
    assert found["labels"]["view"]["train"] == dict.fromkeys(CLIENTS, 12)
    assert found["labels"]["odd"]["measured"] == {"north": 8, "south_and_the_islands": 8, HELD_OUT: 9}
    table = found["transfer"]
    assert table["full"]["0.5"]["labels"] == [18, 18]
    assert set(table["full"]["0.5"]["by_client"]) == {"north", "south_and_the_islands", HELD_OUT}
    for about in (table["linear"]["0.5"], table["full"]["0.5"]):
        mean = about["mean"]["auroc"]
        assert mean["low"] <= mean["mean"] <= mean["high"]
        by_label = [label["auroc"]["values"] for label in about["by_label"].values()]
        assert np.mean(by_label, 0) == pytest.approx(mean["values"])
    assert table["linear"]["0.5"]["mean"]["auroc"]["values"][0] != table["linear"]["0.5"]["mean"]["auroc"]["values"][1]
    one = finetune(run, **common, repeats=1, modes=["full"], label_keys=["odd"], mixed_precision="bf16")
    assert (one["mixed_precision"], list(one["transfer"])) == ("bf16", ["full"])
    assert one["transfer"]["full"]["0.5"]["mean"]["auroc"]["low"] is None, "one draw has no interval"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["linaer"]}, "--modes: linaer is none; there are linear and full"),
        ({"val_split": "train"}, "--val-split: train is trained on"),
        ({"val_split": "dev"}, "dev split"),
        ({"lr": 0}, "--lr: must be above 0, got 0"),
        ({"weight_decay": -1}, "--weight-decay: must be at least 0"),
        ({"mixed_precision": "fp16"}, "--mixed-precision: fp16 needs a GPU; give bf16"),
        ({"label_keys": ["odds"]}, "--label-key: no sample has a label odds; there are: odd, view"),
    ],
)
def test_mistakes_are_named(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(run, device="cpu", **options)


def test_a_launcher_that_accelerate_does_not_know_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "1", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="started 2 processes, of which accelerate sees 1"), accelerated("cpu", None):
        pass
