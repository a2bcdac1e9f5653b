"""Fine-tuning against scikit-learn: a layer on frozen features is worth a logistic regression, the whole encoder more."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import add_model, make_config, make_line, make_run

from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.evaluation.finetune import finetune
from feddra_ds.evaluation.probe import probe

pytestmark = pytest.mark.slow
SIDE = 16


def stripes(rng: np.random.Generator, upright: bool) -> bytes:
    """A PNG of stripes at a random place, in noise: upright or lying, which no single pixel tells."""
    wave = np.sin(np.arange(SIDE) * np.pi / 2 + rng.uniform(0, 2 * np.pi))
    picture = 128 + 50 * (wave[None, :] if upright else wave[:, None]) + rng.normal(0, 25, (SIDE, SIDE))
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained model, on two clients' pictures of stripes; a fifth of them are upright."""
    work, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    with DatasetWriter(work / "data") as writer:
        for client in ("north", "south"):
            for split, count in (("train", 200), ("val", 60), ("test", 120)):
                for number in range(count):
                    info = {"labels": {"upright": int(number % 5 == 0)}, "patient": f"p{number}"}
                    picture = stripes(rng, number % 5 == 0)
                    writer.add(client, split, f"{split}{number:04d}", image=picture, text=f"no. {number}", info=info)
    config = make_config(work / "run", work / "data")
    add_model(work / "run" / "model", config)
    return make_run(work / "run", config, [make_line(0, ["north", "south"])])


def test_linear_is_worth_a_logistic_regression_and_full_more(run: Path) -> None:
    found = finetune(run, fractions=[0.1, 1.0], repeats=2, epochs=20, patience=8, lr=2e-3, device="cpu")
    assert found["split"] == "test"
    expected = probe(run, split="test", fractions=[1.0])["labels"]["upright"]["pooled_probe"]["1"]
    table = {mode: shares["1"]["mean"] for mode, shares in found["transfer"].items()}
    # the standard error of an AUROC of 48 against 192 pictures is at most 0.05
    assert table["linear"]["auroc"]["mean"] == pytest.approx(expected["pooled"]["auroc"], abs=0.05)
    assert table["linear"]["balanced_accuracy"]["mean"] == pytest.approx(
        expected["pooled"]["balanced_accuracy"], abs=0.08
    )
    assert table["full"]["auroc"]["mean"] > table["linear"]["auroc"]["mean"] + 0.1
    few = found["transfer"]["full"]["0.1"]
    assert few["labels"] == [40, 40]
    assert few["mean"]["auroc"]["mean"] < table["full"]["auroc"]["mean"]
