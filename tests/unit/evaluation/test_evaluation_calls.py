"""`evaluate`, `probe` and `export` called from Python give what their commands give, print nothing and keep nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_helpers import add_model, make_config, make_data, make_line, make_run

from feddra_ds.cli import main
from feddra_ds.evaluation.evaluate import evaluate
from feddra_ds.evaluation.export import export
from feddra_ds.evaluation.probe import probe


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(run, export of its model, data); the model is untrained."""
    work = tmp_path_factory.mktemp("work")
    data = make_data(work / "data")
    config = make_config(work / "run", data)
    run = make_run(work / "run", config, [make_line(0)])
    add_model(run / "model", config)
    assert export(run, work / "export") == [work / "export"]
    return run, work / "export", data


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The JSON object that a command prints."""
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluating_a_run(places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = places
    found = evaluate(run)
    assert capsys.readouterr() == ("", "")
    assert not (run / "evaluation.json").exists(), "only the command keeps it for the report"
    assert found == told(capsys, "evaluate", run)
    assert found == json.loads((run / "evaluation.json").read_text())
    assert found["zero_shot"]


def test_evaluating_an_export(places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, model, data = places
    found = evaluate(
        str(model), data=data, split="train", clients=["west"], max_pairs=7, bootstrap=20, seed=3, zero_shot=False
    )
    words = ("--split", "train", "--clients", "west", "--max-pairs", 7, "--bootstrap", 20, "--seed", 3)
    assert found == told(capsys, "evaluate", model, "--data", data, *words, "--no-zero-shot")
    assert found["clients"]["west"]["pairs"] == 7
    assert evaluate(model, data=data, split="train", clients=["west"], max_pairs=None)["clients"]["west"]["pairs"] == 12
    with pytest.raises(ValueError, match="--data: is needed"):
        evaluate(model)


def test_the_control(places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = places
    found = evaluate(run, shuffled_texts=True)
    assert found == told(capsys, "evaluate", run, "--shuffled-texts")
    assert found["control_at_chance"] is True


def test_probing(places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = places
    assert probe(run) == told(capsys, "probe", run)
    found = probe(run, label_keys=["view"], fractions=[0.5], features="embedding", clients=["north"], strength=0.1)
    words = ("--label-key", "view", "--fractions", 0.5, "--features", "embedding", "--clients", "north")
    assert found == told(capsys, "probe", run, *words, "--strength", 0.1)
