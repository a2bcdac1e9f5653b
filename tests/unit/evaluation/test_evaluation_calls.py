"""`evaluate`, `probe` and `export` called from Python give what their commands give, print nothing and keep nothing; and
what they give is what docs/json_output.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documented_json import check_documented
from run_helpers import add_model, make_config, make_data, make_line, make_run

from feddra_ds.cli import main
from feddra_ds.evaluation.embeddings import embed
from feddra_ds.evaluation.evaluate import evaluate
from feddra_ds.evaluation.export import export
from feddra_ds.evaluation.finetune import finetune
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


def test_fine_tuning(places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, other, data = places
    found = finetune(run, label_keys=["view"], fractions=[0.5], epochs=1, repeats=2, device="cpu")
    assert capsys.readouterr().out == ""
    assert not (run / "finetune.json").exists(), "only the command keeps it for the report"
    words = ("--fractions", 0.5, "--epochs", 1, "--repeats", 2, "--device", "cpu")
    assert found == told(capsys, "finetune", run, *words, "--label-key", "view")
    assert found == json.loads((run / "finetune.json").read_text())
    check_documented("finetune", found, but="non_finite|REASON|labels_left_out")
    assert main(["report", str(run), "--examples", "0"]) == 0
    page = " ".join(re.sub(r"<[^>]+>", " ", (run / "report.html").read_text()).split())
    best = found["transfer"]["full"]["0.5"]["by_label"]["view"]["auroc"]
    assert "label, client linear 50 % full 50 %" in page
    assert f"{best['mean']:.3f} ({best['low']:.3f} to {best['high']:.3f}) accuracy" in page
    assert "val said when to stop too" in page
    capsys.readouterr()
    assert (
        main([str(w) for w in ("finetune", other, "--data", data, "--modes", "linear", "--label-key", "odd", *words)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "labelled pairs that were trained on: 18 at 50 %" in shown
    assert "kept in" not in shown
    assert "beyond (held out)" in shown


def test_everything_that_is_measured_is_documented(
    places: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other, _ = places
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("odd:\n  yes: an odd one\n  no: [an even one, not odd]\n")
    saved = tmp_path / "saved.safetensors"
    options: dict[str, Any] = {"bootstrap": 20, "subgroups": ["site", "odd"], "prompts": prompts}
    found = evaluate(run, **options, compare=other, save_embeddings=saved, match_by="patient")
    words = ("--subgroup", "site,odd", "--prompts", prompts, "--save-embeddings", saved, "--match-by", "patient")
    assert main([str(w) for w in ("evaluate", run, *words, "--compare", other, "--bootstrap", 20)]) == 0
    shown = capsys.readouterr().out
    assert "worst subgroup: " in shown
    assert "on the same pairs" in " ".join(shown.split())
    assert found == json.loads((run / "evaluation.json").read_text())
    left_out = "non_finite|REASON|loss_not_finite|labels_left_out"  # of which these data have none
    check_documented("evaluate", found, evaluate(run, shuffled_texts=True), but=left_out)
    check_documented("probe", probe(run, repeats=1), but=left_out)

    plain = evaluate(run, bootstrap=20)
    north = plain["clients"]["north"]
    assert found["clients"]["north"]["chance@1"] > north["chance@1"], "pairs of a patient match"
    view = found["zero_shot"]["view"], plain["zero_shot"]["view"]
    assert view[0]["pooled"] == view[1]["pooled"]
    assert found["zero_shot"]["odd"]["pooled"] != plain["zero_shot"]["odd"]["pooled"], "other prompts, other scores"
    by_site = found["subgroups"]["fields"]["site"]["north"]
    assert by_site["pairs"] == north["pairs"] == 8
    assert all(e["difference"] == 0 for ks in found["compared"]["retrieval"].values() for e in ks.values())

    from safetensors import safe_open
    from safetensors.numpy import load_file

    embeddings = load_file(saved)
    again = tmp_path / "again.safetensors"
    about = told(capsys, "embed", run, "--out", again)
    check_documented("embed", about, but=left_out)
    assert about == embed(run, again)
    with safe_open(again, "np") as one, safe_open(saved, "np") as other:
        assert one.metadata() == other.metadata(), "embed writes what evaluate saves"
        assert all(np.array_equal(one.get_tensor(name), embeddings[name]) for name in embeddings)
    assert embeddings["image"].shape == embeddings["text"].shape == (8 + 8 + 9, 8)
    assert np.linalg.norm(embeddings["image"], axis=1) == pytest.approx(1, abs=1e-5)
    assert found["compared"]["zero_shot"]["odd"]["first"] == found["zero_shot"]["odd"]["pooled"]["auroc"]
