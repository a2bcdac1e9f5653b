"""A model with one weight that is not a number is said to be one by every command that opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import CLIENTS, HELD_OUT, add_model, make_config, make_data, make_line, make_run

from feddra_ds import cli
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


# command → its words, RUN and OUT filled in: each that opens a model
COMMANDS = {
    "evaluate": "evaluate RUN --bootstrap 20 --json",
    "probe": "probe RUN --features embedding --json",
    "finetune": "finetune RUN --epochs 1 --fractions 1 --repeats 1 --modes linear --device cpu --json",
    "embed": "embed RUN --out OUT/all.safetensors --json",
    "search": "search report --model RUN --out OUT/page.html --json",
    "export": "export RUN --out OUT/model",
    "export to transformers": "export RUN --out OUT/model --format transformers",
    "report": "report RUN --examples 2",
    "report without examples": "report RUN --examples 0",
    "report of several": "report RUN OUT/other --out OUT/both.html",
}
KEPT = {
    "evaluation.json": "north: 8 image embeddings are not finite",
    "finetune.json": "val: the model has 1 weights that are not finite",
}
PAIRS = {"north": 8, "south_and_the_islands": 8, HELD_OUT: 9}  # of val, or of its stand-in


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_says_so(
    spoilt: tuple[Path, str], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, name = spoilt
    make_run(tmp_path / "other", make_config(tmp_path / "other", run.parent / "data"), [make_line(0)])
    words = COMMANDS[case].replace("RUN", str(run)).replace("OUT", str(tmp_path)).split()
    out, error = told(capsys, *words)
    # an export to transformers has names of its own
    assert (name if case != "export to transformers" else "weights that are not finite: ") in error
    if "--json" in words:
        CHECKS[case](json.loads(out, parse_constant=refuse), name, error)
    for page in (*tmp_path.glob("*.html"), *([run / "report.html"] if case.startswith("report RUN") else [])):
        assert name in page.read_text()
    for kept, line in KEPT.items():
        if (run / kept).exists():
            _, error = told(capsys, "report", run, "--examples", 0)
            assert line in error, f"it shows what {kept} keeps"
            assert line in (run / "report.html").read_text()
            (run / kept).unlink()


def test_no_command_that_opens_a_model_is_missing() -> None:
    opens = {name for name in cli.COMMANDS if _opens_a_model(name)}
    assert opens == {words.split()[0] for words in COMMANDS.values()}


def _opens_a_model(command: str) -> bool:
    parser = cli.build_parser(command.split())[1]
    assert parser is not None
    return any(action.dest in ("model", "run_dirs", "source") for action in parser._actions) and " " not in command


def check_evaluate(result: dict[str, Any], name: str, error: str) -> None:
    check_embed(result, name, error)
    for about in [*result["clients"].values(), result["pooled"]]:
        assert {about[f"{way}_recall@{k}"] for way in ("i2t", "t2i") for k in (1, 5)} == {0.0}
    assert result["worst_mixture"]["loss"] is None
    assert result["worst_mixture"]["loss_not_finite"] == list(PAIRS)
    assert result["zero_shot"]["odd"]["pooled"]["auroc"] == 0


def check_embed(result: dict[str, Any], name: str, error: str) -> None:
    assert result["non_finite"]["weights"] == {name: 1}
    pairs = result["non_finite"]["pairs"]
    found = {client: {side: len(keys) for side, keys in sides.items()} for client, sides in pairs.items()}
    assert found == {client: {"image": count} for client, count in PAIRS.items()}
    assert f"feddra-ds: the model has 1 weights that are not finite: {name} (1)" in error
    assert "feddra-ds: north: 8 image embeddings are not finite: val0" in error


def check_search(result: dict[str, Any], name: str, error: str) -> None:
    check_embed(result, name, error)
    assert (result["pictures"], result["hits"]) == (sum(PAIRS.values()), []), "none is found by what is no number"


def check_probe(result: dict[str, Any], name: str, error: str) -> None:
    assert result["labels"] == {}
    assert set(result["labels_left_out"]) == {"odd", "view"}
    assert result["non_finite"]["val"]["weights"] == {name: 1}
    assert "north: 12 image embeddings are not finite" in error


def check_finetune(result: dict[str, Any], name: str, error: str) -> None:
    """The features before the head are finite here, so that the table is there, and the weight is named all the same."""
    assert result["non_finite"]["train"] == {"weights": {name: 1}, "pairs": {}}
    assert set(result["transfer"]["linear"]["1"]["by_label"]) == {"odd", "view"}
    assert f"feddra-ds: val: the model has 1 weights that are not finite: {name} (1)" in error


CHECKS = {
    "evaluate": check_evaluate,
    "probe": check_probe,
    "finetune": check_finetune,
    "embed": check_embed,
    "search": check_search,
}


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
