"""A model with one weight that is not a number is said to be one by every command that opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import CLIENTS, HELD_OUT, add_model, make_config, make_data, make_line, make_run

from feddra_ds.cli import main
from feddra_ds.experiments.measure import measure
from feddra_ds.experiments.spec import EvaluateSpec
from feddra_ds.model.folder import load_pretrained, save_model


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run, name of the weight): one value of the pictures' head is NaN."""
    work = tmp_path_factory.mktemp("spoilt")
    data = make_data(work / "data")
    sections = {
        "model": {"head": {"kind": "linear"}, "num_extra_blocks": 0},
        "objective": {"learnable_temperature": True},
    }
    config = make_config(work / "run", data, **sections)
    run = make_run(work / "run", config, [make_line(0)])
    add_model(run / "model", config)
    model, processor = load_pretrained(run / "model")
    name = [n for n, p in model.named_parameters() if "vision.head" in n and p.dim() == 2][-1]
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("nan")
    save_model(model.state_dict(), model.config, processor, run / "model")
    return run, name


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """(stdout, stderr) of a command that must fail."""
    assert main([str(word) for word in words]) == 1
    out, error = capsys.readouterr()
    return out, error


def refuse(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def test_evaluate(spoilt: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, name = spoilt
    out, error = told(capsys, "evaluate", run, "--bootstrap", 20, "--json")
    result = json.loads(out, parse_constant=refuse)
    assert result["non_finite"]["weights"] == {name: 1}
    pairs = result["non_finite"]["pairs"]
    assert {client: {side: len(keys) for side, keys in sides.items()} for client, sides in pairs.items()} == {
        "north": {"image": 8}, "south_and_the_islands": {"image": 8}, HELD_OUT: {"image": 9},
    }  # fmt: skip
    for about in [*result["clients"].values(), result["pooled"]]:
        assert {about[f"{way}_recall@{k}"] for way in ("i2t", "t2i") for k in (1, 5)} == {0.0}
    assert result["worst_mixture"]["loss"] is None
    assert result["worst_mixture"]["loss_not_finite"] == ["north", "south_and_the_islands", HELD_OUT]
    assert result["zero_shot"]["odd"]["pooled"]["auroc"] == 0
    assert f"feddra-ds: the model has 1 weights that are not finite: {name} (1)" in error
    assert "feddra-ds: north: 8 image embeddings are not finite: val0" in error
    _, error = told(capsys, "report", run, "--examples", 0)
    assert "north: 8 image embeddings are not finite" in error, "it shows what evaluate kept"
    assert "north: 8 image embeddings are not finite" in (run / "report.html").read_text()
    (run / "evaluation.json").unlink()


def test_probe(spoilt: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, error = told(capsys, "probe", spoilt[0], "--features", "embedding", "--json")
    result = json.loads(out, parse_constant=refuse)
    assert result["labels"] == {}
    assert set(result["labels_left_out"]) == {"odd", "view"}
    assert result["non_finite"]["val"]["weights"] == {spoilt[1]: 1}
    assert spoilt[1] in error
    assert "north: 12 image embeddings are not finite" in error


def test_finetune(spoilt: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The features before the head are finite here, so that the table is there, and the weight is named all the same."""
    run, name = spoilt
    words = ("--epochs", 1, "--fractions", 1, "--repeats", 1, "--modes", "linear", "--device", "cpu", "--json")
    out, error = told(capsys, "finetune", run, *words)
    result = json.loads(out, parse_constant=refuse)
    assert result["non_finite"]["train"] == {"weights": {name: 1}, "pairs": {}}
    assert set(result["transfer"]["linear"]["1"]["by_label"]) == {"odd", "view"}
    assert f"feddra-ds: val: the model has 1 weights that are not finite: {name} (1)" in error
    _, error = told(capsys, "report", run, "--examples", 0)
    assert error.count(name) == 3
    (run / "finetune.json").unlink()


def test_report(spoilt: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    for examples in (2, 0):
        _, error = told(capsys, "report", spoilt[0], "--examples", examples)
        assert error.count(spoilt[1]) == 1
        assert spoilt[1] in (spoilt[0] / "report.html").read_text()


@pytest.mark.parametrize("form", ["feddra", "transformers"])
def test_export(spoilt: tuple[Path, str], form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, error = told(capsys, "export", spoilt[0], "--out", tmp_path / "out", "--format", form)
    assert f"wrote {tmp_path / 'out'}" in out
    assert "weights that are not finite: " in error


def test_a_temperature(spoilt: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings stay finite, and so does the JSON."""
    model, processor = load_pretrained(spoilt[0] / "model")
    state = {name: torch.nan_to_num(x) for name, x in model.state_dict().items()}
    (name,) = (name for name in state if "temperature" in name)
    state[name] = torch.full_like(state[name], float("nan"))
    save_model(state, model.config, processor, tmp_path / "model")
    words = ("--data", spoilt[0].parent / "data", "--bootstrap", 5, "--json")
    out, error = told(capsys, "evaluate", tmp_path / "model", *words)
    result = json.loads(out, parse_constant=refuse)
    assert result["non_finite"] == {"weights": {name: 1}, "pairs": {}}
    assert result["zero_shot"]["odd"]["pooled"]["calibration"] is None
    assert name in error


def test_an_experiments_arm(spoilt: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match="1 weights that are not finite"):
        measure(spoilt[0], EvaluateSpec(), [make_line(0, CLIENTS)])
