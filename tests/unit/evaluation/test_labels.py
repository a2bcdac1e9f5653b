"""Labels as tasks, prompts and measures; zero-shot and probes on features where the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from feddra_ds.commands._model_arguments import parse_fractions
from feddra_ds.evaluation.gallery import Gallery
from feddra_ds.evaluation.labels import draw_labels, find_tasks, read_prompts, readable
from feddra_ds.evaluation.probe import probe_all
from feddra_ds.evaluation.zero_shot import zero_shot_scores
from feddra_ds.metrics.classification import measure


def infos(key: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"labels": {key: value}} for value in values]


def test_binary_values_of_every_spelling() -> None:
    values = [1, 0, True, False, "1", "0", "yes", "No", "positive", "absent", None, "", -1, "uncertain"]
    (task,), refused = find_tasks(infos("Pleural_Effusion", values))
    assert task.targets.tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, -1, -1, -1, -1]
    assert task.binary
    assert refused == {}
    assert task.prompts()[0][0] == "no pleural effusion"
    assert task.prompts()[1][0] == "pleural effusion"


def test_classes_lists_and_what_is_no_label() -> None:
    (task,), _ = find_tasks(infos("view", ["PA", "AP", "lateral", "AP"]))
    assert (task.classes, task.targets.tolist()) == (("AP", "PA", "lateral"), [1, 0, 2, 0])
    parts, _ = find_tasks(infos("things", ["cat|dog", "dog", "cat|dining table", None]))
    assert {t.name: t.targets.tolist() for t in parts} == {
        "things:cat": [1, 0, 1, -1],
        "things:dog": [1, 1, 0, -1],
        "things:dining table": [0, 0, 1, -1],
    }
    assert parts[0].prompts()[1][0] in ("cat", "dog")
    assert find_tasks(infos("age", list(range(60))))[1] == {"age": "60 different values are more than 50 classes"}
    assert find_tasks(infos("same", ["x", "x"]))[1] == {"same": "all known values are the same"}
    assert find_tasks(infos("none", [None, ""]))[1] == {"none": "no value is known"}
    assert find_tasks([{}, {"labels": {}}]) == ([], {})


def test_more_parts_than_classes_are_cut_and_said() -> None:
    values = ["|".join(f"thing{i}" for i in range(j, j + 30)) for j in range(60)]
    tasks, refused = find_tasks(infos("things", values))
    assert len(tasks) == 50
    assert refused == {"things": "39 rarer parts are left out"}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37, 1.0])
def test_a_draw_of_labels_is_stratified_and_has_one_of_each_class(fraction: float) -> None:
    rng = np.random.default_rng(0)
    view = rng.choice(3, 500, p=[0.6, 0.3, 0.1])
    targets = np.stack([view, rng.choice([-1, 0, 1], 500, p=[0.2, 0.6, 0.2]), np.arange(500) == 7], 1).astype(np.int64)
    draws = [draw_labels(targets, fraction, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1])
    assert fraction == 1 or not np.array_equal(draws[0], draws[2])
    for chosen in draws:
        assert np.array_equal(chosen, np.unique(chosen))
        added = len(chosen) - round(fraction * 500)
        assert 0 <= added <= 7, "no more than one of each class is added"
        for k in range(3):
            assert set(targets[chosen, k]) >= set(targets[:, k]) - {-1}
        shares = np.bincount(view[chosen], minlength=3) - fraction * np.bincount(view)
        assert np.abs(shares).max() <= 1 + added
    assert len(draw_labels(targets[:0], fraction, rng)) == 0


def test_an_unknown_label_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="--label-key: no sample has a label edma; there are: edema"):
        find_tasks(infos("edema", [0, 1]), ["edma"])
    with pytest.raises(ValueError, match="the samples have no labels"):
        find_tasks([{}], ["edema"])


def test_measures_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 80)
    scores = rng.normal(0, 1, (80, 2)) + np.eye(2)[targets]
    told = measure(targets, scores)
    assert told is not None
    assert told["auroc"] == pytest.approx(roc_auc_score(targets, scores[:, 1] - scores[:, 0]))
    assert told["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, scores.argmax(1)))
    assert told["positives"] == targets.sum()
    targets = rng.integers(0, 3, 90)
    scores = rng.normal(0, 1, (90, 3)) + np.eye(3)[targets]
    told = measure(np.where(np.arange(90) % 9 == 0, -1, targets), scores)
    known = np.arange(90) % 9 != 0
    one_vs_rest = np.mean([roc_auc_score(targets[known] == c, scores[known][:, c]) for c in range(3)])
    assert told is not None
    assert told["auroc"] == pytest.approx(one_vs_rest)
    assert told["n"] == known.sum()
    assert measure(np.zeros(5, dtype=np.int64), np.zeros((5, 2))) is None


def test_zero_shot_finds_the_class_whose_prompts_are_near() -> None:
    (task,), _ = find_tasks(infos("edema", [1, 0, 1]))
    image = np.array([[1, 0], [0, 1], [0.8, 0.6]], dtype=np.float32)
    embed = lambda texts: np.array([[0, 1] if "no " in t.lower() else [1, 0] for t in texts], dtype=np.float32)
    scores = zero_shot_scores(task.prompts(), image, embed)
    assert scores.argmax(1).tolist() == [1, 0, 1]
    assert np.abs(scores).max() <= 1 + 1e-9


def test_prompts_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("edema:\n  yes: [wet]\n  no: dry\nview:\n  AP: [lying]\n  PA: [standing, upright]\n")
    given = read_prompts(file)
    edema, view = find_tasks([{"labels": {"edema": i, "view": v}} for i, v in ((0, "PA"), (1, "AP"))])[0]
    assert edema.prompts(given) == [["dry"], ["wet"]]
    assert view.prompts(given) == [["lying"], ["standing", "upright"]]
    assert edema.prompts({}) == edema.prompts()
    with pytest.raises(ValueError, match="--prompts: view: needs the classes AP, PA, got AP"):
        view.prompts({"view": {"AP": ["lying"]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no labels"),
        ("edema: [wet]", "edema: needs a list of prompts for each class"),
        ("edema: {yes: [], no: [dry]}", "edema: needs a list of prompts for each class"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_prompts(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.yaml")


def test_readable() -> None:
    assert readable("Pleural_Effusion") == readable("pleural-effusion") == "pleural effusion"


@pytest.mark.parametrize(
    ("text", "message"), [("0.1,x", "'x' is no number"), ("0", "0 is no share"), ("1.5", "1.5 is no share")]
)
def test_bad_fractions(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--fractions: {message}"):
        parse_fractions(text)


def gallery(client: str, split: str, targets: np.ndarray, rng: np.random.Generator, shift: float) -> Gallery:
    features = rng.normal(0, 1, (len(targets), 6)).astype(np.float32)
    features[:, 0] += 3 * targets + shift
    return Gallery(
        client=client,
        split=split,
        image=features,
        text=features,
        text_ids=np.arange(len(targets)),
        features=features,
        keys=[str(i) for i in range(len(targets))],
        infos=infos("sick", [int(t) for t in targets]),
        skipped={},
        temperature=0.07,
    )


def test_a_probe_learns_what_can_be_learned_and_never_from_the_held_out() -> None:
    rng = np.random.default_rng(0)
    half = np.arange(200) % 2
    train = {c: gallery(c, "train", half, rng, 0.0) for c in ("a", "b")}
    poisoned = gallery("held", "train", 1 - half, rng, 0.0)  # would ruin the pooled probe if it were trained on
    val = {c: gallery(c, "val", half, rng, 0.0) for c in ("a", "b", "held")}
    probed = probe_all(train | {"held": poisoned}, val, ["held"], None, [0.01, 1.0], repeats=4, seed=0, strength=1.0)
    sick = probed["labels"]["sick"]
    full = sick["pooled_probe"]["1"]
    assert full["labels"] == 400
    assert full["pooled"]["auroc"] > 0.95
    assert full["held"]["auroc"] > 0.95
    assert full["a"]["auroc_sd"] == 0
    few = sick["pooled_probe"]["0.01"]
    assert few["labels"] == 4
    assert 0.4 < few["pooled"]["auroc"] < full["pooled"]["auroc"]
    assert few["pooled"]["auroc_sd"] > 0
    assert set(sick["own_probe"]["1"]) == {"a", "b"}
    assert sick["own_probe"]["1"]["a"]["balanced_accuracy"] > 0.85


def test_a_probe_of_several_classes_one_of_which_a_client_lacks() -> None:
    rng = np.random.default_rng(0)
    parts = {}
    for split in ("train", "val"):
        targets = {"a": np.arange(90) % 3, "b": np.arange(90) % 2}
        parts[split] = {}
        for client, y in targets.items():
            made = gallery(client, split, np.zeros(90, dtype=int), rng, 0.0)
            made.features[:, :3] += 4 * np.eye(3, dtype=np.float32)[y]
            parts[split][client] = Gallery(**{**made.__dict__, "infos": infos("kind", [f"k{i}" for i in y])})
    probed = probe_all(parts["train"], parts["val"], [], ["kind"], [1.0], repeats=1, seed=0, strength=1.0)
    kind = probed["labels"]["kind"]
    assert kind["classes"] == 3
    assert kind["pooled_probe"]["1"]["pooled"]["auroc"] > 0.95
    assert kind["own_probe"]["1"]["b"]["balanced_accuracy"] > 0.9


def test_a_label_that_one_side_lacks_is_left_out_with_the_reason() -> None:
    rng = np.random.default_rng(0)
    train = {"a": gallery("a", "train", np.zeros(20, dtype=int), rng, 0.0)}
    val = {"a": gallery("a", "val", np.arange(20) % 2, rng, 0.0)}
    probed = probe_all(train, val, [], None, [1.0], repeats=1, seed=0, strength=1.0)
    assert probed["labels"] == {}
    assert "only one of its classes occurs" in probed["labels_left_out"]["sick"]
