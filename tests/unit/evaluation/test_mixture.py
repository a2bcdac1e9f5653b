"""The worst mixture that `evaluate` measures, against the definition: L_i and recall@5 by client, and the set's worst p."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import HELD_OUT, add_model, make_config, make_data, make_line, make_run

from feddra_ds.cli import main
from feddra_ds.evaluation.evaluate import evaluate
from feddra_ds.evaluation.gallery import Gallery
from feddra_ds.evaluation.mixture import Measured, center_of, measure_mixture, named_set, pair_losses, set_of
from feddra_ds.losses import fused_dro_loss
from feddra_ds.objectives.ita import ImageTextAlignment
from feddra_ds.run.files import open_run
from feddra_ds.strategies.mixture_set import MixtureSet


def gallery(client: str, n: int, seed: int, noise: float) -> Gallery:
    """Texts are random directions, images the same with noise; two pairs a patient."""
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((n, 32))
    image = text + noise * rng.standard_normal((n, 32))
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(n) + 1000 * seed
    infos = [{"patient": f"p{i // 2}"} for i in range(n)]
    none = np.zeros((n, 0), dtype=np.float32)
    return Gallery(client, "val", unit(image), unit(text), ids, none, [f"{i}" for i in range(n)], infos, {}, 0.1)


CLIENTS = {
    "easy": gallery("easy", 70, 1, 0.3),
    "middle": gallery("middle", 64, 2, 2.0),
    "hard": gallery("hard", 40, 3, 9.0),
}
FAR = gallery("far", 48, 4, 3.0)


def a_run(tmp_path: Path, **sections: Any) -> Any:
    config = make_config(tmp_path / "run", tmp_path / "data", **sections)
    return open_run(make_run(tmp_path / "run", config, [make_line(0)]))


def measured(galleries: dict[str, Gallery], run: Any, worst_over: str | None = None, **pairs: int) -> Any:
    held_out = [name for name in galleries if name == "far"]
    return measure_mixture(galleries, held_out, run, pairs, worst_over=worst_over, draws=300, seed=0)


def test_losses_of_a_gallery_are_the_objectives_in_batches_of_one_size() -> None:
    one = CLIENTS["easy"]
    objective = ImageTextAlignment(ImageTextAlignment.Options())
    found = pair_losses(one, objective, 32)
    assert found.shape == (64,), "the six pairs beyond the second batch are left out"
    for i in (0, 32):
        image, text = (torch.from_numpy(x[i : i + 32]) for x in (one.image, one.text))
        expected = fused_dro_loss(image, text, temperature=0.1)
        assert found[i : i + 32].mean() == pytest.approx(float(expected.alignment.mean()), rel=1e-5)
    assert pair_losses(one, objective, 71).size == 0
    blind = Gallery(
        **{**one.__dict__, "image": np.repeat(one.image[:1], 70, 0), "text": np.repeat(one.text[:1], 70, 0)}
    )
    assert pair_losses(blind, objective, 32).mean() == pytest.approx(2 * math.log(32), rel=1e-5)


def test_the_worst_mixture_is_the_sets(tmp_path: Path) -> None:
    dro = {"radius": 0.2, "minimum_weight": 0.1, "maximum_weight": None}
    dro |= {"evaluation_pairs": 32, "evaluation_batch_size": 32}
    told = measured(CLIENTS | {"far": FAR}, a_run(tmp_path, dro=dro))
    by_loss, by_recall = told["weights_by_loss"], told["weights_by_recall"]
    inside = MixtureSet("chi2", 0.2, np.full(3, 1 / 3))
    for weights in (by_loss, by_recall):
        assert list(weights) == list(CLIENTS), "the held-out site is in no mixture"
        assert sum(weights.values()) == pytest.approx(1)
        assert inside.divergence(list(weights.values())) == pytest.approx(0.2)
        assert weights["hard"] == max(weights.values())
        assert weights["easy"] == min(weights.values())
    objective = ImageTextAlignment(ImageTextAlignment.Options())
    each = np.array([pair_losses(g, objective, 32).mean() for g in CLIENTS.values()])
    assert told["loss"] == pytest.approx(float(inside.worst(each) @ each))
    assert told["mean"]["loss"]["value"] == pytest.approx(each.mean())
    assert told["worst_client"]["loss"] | {"low": 0, "high": 0} == {
        "id": "hard", "value": pytest.approx(each[2]), "low": 0, "high": 0,
    }  # fmt: skip
    assert told["mean"]["loss"]["value"] < told["loss"] < told["worst_client"]["loss"]["value"]
    assert told["worst_client"]["recall@5"]["value"] < told["recall@5"] < told["mean"]["recall@5"]["value"]
    for key in ("loss", "recall@5"):
        assert told["intervals"][key]["low"] < told[key] < told["intervals"][key]["high"]
        assert set(told["held_out"]["far"]) == {"loss", "recall@5"}
    assert told["set"] == {"kind": "chi2", "radius": 0.2, "minimum": 0.1, "maximum": None}
    assert json.loads(json.dumps(told)) == told


def test_the_set_is_the_runs_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    pinned = a_run(tmp_path, dro={"radius": 0.0})
    assert measured(CLIENTS, pinned)["set"]["radius"] == 1.0, "a set of one mixture says nothing"
    for words, kind, radius in (("kl:0.3", "kl", 0.3), ("cvar:1", "cvar", 1.0), ("simplex", "simplex", 0.0)):
        told = measured(CLIENTS, pinned, words)
        assert (told["set"]["kind"], told["set"]["radius"]) == (kind, radius)
    assert told["weights_by_loss"] == {"easy": 0, "middle": 0, "hard": 1}
    assert told["loss"] == told["worst_client"]["loss"]["value"]
    export = measured(CLIENTS, None)
    assert export["loss"] is None, "an exported model has no objective"
    assert export["weights_by_loss"] is None
    assert (export["set"]["kind"], export["set"]["radius"]) == ("chi2", 1.0)
    for words in ("chi2", "tv:1", "chi2:-1", "kl:x", ""):
        with pytest.raises(ValueError, match=r"--worst-over: must be chi2:RADIUS, kl:RADIUS"):
            named_set(words, 3)


def test_the_runs_keys_make_its_set(tmp_path: Path) -> None:
    run = a_run(tmp_path, dro={"center": "samples", "radius": 0.7})
    center = center_of(run, [30, 10, 60])
    np.testing.assert_allclose(center, [0.3, 0.1, 0.6])
    assert set_of(run, center).radius == 0.7
    np.testing.assert_allclose(
        center_of(run, [0, 10, 60]), 1 / 3, err_msg="an export's data need not have the train split"
    )
    run.config["dro"] |= {"set": "cvar", "radius_share": 0.5, "minimum_weight": 0.1, "maximum_weight": 2.0}
    inside = set_of(run, center)
    assert (inside.kind, inside.minimum, inside.maximum) == ("cvar", 0.1, 2.0)
    assert inside.radius == pytest.approx(0.5 * (1 / 0.1 - 1))
    run.config["dro"] = {}
    assert (set_of(run, center).kind, set_of(run, center).radius) == ("chi2", 1.0)


def test_clients_with_too_few_pairs_are_in_no_mixture_and_named(tmp_path: Path) -> None:
    run = a_run(tmp_path, dro={"evaluation_pairs": 32, "evaluation_batch_size": 32})
    tiny = CLIENTS | {"tiny": gallery("tiny", 5, 5, 9.0)}
    told = measured(tiny, run)
    assert told["too_few_pairs"] == {"loss": ["tiny"], "recall@5": ["tiny"]}
    assert "tiny" not in told["weights_by_loss"]
    assert told["loss"] == pytest.approx(measured(CLIENTS, run)["loss"])
    assert measured({"easy": CLIENTS["easy"], "far": FAR}, run) is None, "one client is no mixture"
    two_tiny = {name: gallery(name, 5, i, 1.0) for i, name in enumerate("ab")}
    assert measured(two_tiny, run) is None


def test_resampling_whole_patients_and_shares_without_spread() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=200), 4)  # four equal pairs a patient: as much evidence as 200 pairs
    wide = Measured.of(values, [str(i // 4) for i in range(800)], 500, 0)
    narrow = Measured.of(values, [str(i) for i in range(800)], 500, 0)
    assert wide.value == pytest.approx(values.mean())
    assert wide.drawn.std() == pytest.approx(200**-0.5, rel=0.2)
    assert narrow.drawn.std() == pytest.approx(800**-0.5, rel=0.2)
    none = Measured.of(np.zeros(30), [str(i) for i in range(30)], 2000, 0)
    assert none.value == 0
    assert 0.02 < np.quantile(none.drawn, 0.975) < 0.15, "no hit among 30 is no certainty"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    config = make_config(work / "run", make_data(work / "data"))
    run = make_run(work / "run", config, [make_line(0)])
    add_model(run / "model", config)
    return run


def test_the_command_prints_it(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(places), "--bootstrap", "50", "--worst-over", "kl:0.1"]) == 0
    text = capsys.readouterr().out
    in_lines = " ".join(text.split())  # a long title is wrapped
    assert "The worst mixture of the clients within the KL ball, ρ = 0.1; by chance the loss is " in in_lines
    for row in ("worst mixture", "worst client (", "mean of the clients", f"{HELD_OUT} (held out)"):
        assert row in text
    assert "its weights by loss:" in text
    assert "its weights by recall:" in text
    assert main(["evaluate", str(places), "--worst-over", "ball"]) == 2
    assert "--worst-over: must be chi2:RADIUS" in capsys.readouterr().err
    control = evaluate(places, shuffled_texts=True)
    assert "worst_mixture" not in control


def test_the_report_shows_it(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(places), "--bootstrap", "50"]) == 0
    told = json.loads((places / "evaluation.json").read_text())["worst_mixture"]
    assert main(["report", str(places), "--examples", "0"]) == 0
    page = (places / "report.html").read_text()
    worst = told["worst_client"]["loss"]
    assert told["losses"][worst["id"]] == pytest.approx(worst["value"])
    assert "The worst mixture of the clients" in page
    assert "within the χ² ball, ρ = 1" in page
    assert f"<b>{told['loss']:.3f}</b>" in page
    assert f"By chance the loss is {told['loss_by_chance']:.3g}" in page
    kept = json.loads((places / "evaluation.json").read_text())
    del kept["worst_mixture"]  # as an older evaluation wrote it
    (places / "evaluation.json").write_text(json.dumps(kept))
    assert main(["report", str(places), "--examples", "0"]) == 0
    assert "The worst mixture of the clients" not in (places / "report.html").read_text()
