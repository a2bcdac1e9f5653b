"""What `evaluate` measures, on galleries whose answer is known: perfect, blind, shuffled, and one that leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from feddra_ds.evaluation.compare import compare_retrieval, compare_zero_shot
from feddra_ds.evaluation.gallery import Gallery, value_of
from feddra_ds.evaluation.labels import Task
from feddra_ds.evaluation.retrieval import across, join, measure_retrieval, retrieve, shuffle, skill
from feddra_ds.evaluation.subgroups import find_subgroups, measure_subgroups
from feddra_ds.evaluation.verdict import ABOVE, BELOW, POOLED, UNSURE, joint_verdict
from feddra_ds.evaluation.zero_shot import Scored


def gallery(client: str, n: int, seed: int, noise: float) -> Gallery:
    """Texts are random directions, images the same with noise; two pairs a patient."""
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((n, 32))
    image = text + noise * rng.standard_normal((n, 32))
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return Gallery(
        client=client,
        split="val",
        image=unit(image),
        text=unit(text),
        text_ids=np.arange(n) + 1000 * seed,
        features=np.zeros((n, 0), dtype=np.float32),
        keys=[f"{i}" for i in range(n)],
        infos=[{"patient": f"p{i // 2}"} for i in range(n)],
        skipped={},
        temperature=0.07,
    )


def told(galleries: dict[str, Gallery], *, shuffled: bool = False, shared: bool = True, **more: Any) -> dict[str, Any]:
    pieces: dict[str, Any] = {"held_out": [], "draws": 300, "seed": 0, "shuffled": shuffled} | more
    return measure_retrieval(galleries, pieces.pop("held_out"), one_model=shared, **pieces)


def test_a_model_that_knows_and_one_that_does_not() -> None:
    clients = {
        "good": gallery("good", 60, 1, 0.3),
        "bad": gallery("bad", 60, 2, 50.0),
        "far": gallery("far", 40, 3, 0.3),
    }
    result = told(clients, held_out=["far"])
    assert result["clients"]["good"]["i2t_recall@1"] == 1.0
    assert result["clients"]["good"]["intervals"]["recall@1"]["verdict"] == ABOVE
    assert result["clients"]["bad"]["intervals"]["recall@5"]["verdict"] == UNSURE
    assert result["clients"]["far"]["held_out"]
    assert result[POOLED]["pairs"] == 120, "held-out clients are not in the pooled gallery"
    assert result["worst_client"]["id"] == "bad"
    assert result["worst_client"]["skill@5"] == pytest.approx(0, abs=0.1)
    assert result["mean"]["i2t_recall@1"] == pytest.approx((1.0 + result["clients"]["bad"]["i2t_recall@1"]) / 2)
    assert result["worst"]["i2t_recall@1"] == result["clients"]["bad"]["i2t_recall@1"]
    assert result["spread"]["i2t_recall@1"] == pytest.approx(1.0 - result["clients"]["bad"]["i2t_recall@1"])
    assert result["control_at_chance"] is None


def test_shuffled_texts_are_at_chance_whatever_the_model_knows() -> None:
    clients = {"a": gallery("a", 80, 1, 0.1), "b": gallery("b", 50, 2, 0.1)}
    # each site has a direction of its own, so that a pooled gallery shuffled within sites only would tell them apart
    for number, one in enumerate(clients.values()):
        for x in (one.image, one.text):
            x[:, number] += 5
            x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert told(clients)[POOLED]["i2t_recall@1"] > 0.9
    for seed in range(5):
        shuffled = told(clients, shuffled=True, seed=seed)
        assert shuffled["control_at_chance"] is True
        for k in (1, 5, 10):
            about = shuffled[POOLED]["intervals"][f"recall@{k}"]
            assert about["recall"] == pytest.approx(k / 130, abs=0.02)
            assert about["low"] < about["recall"] < about["high"]


def test_a_control_above_chance_is_caught() -> None:
    one = gallery("a", 90, 1, 0.1)
    frequent = np.arange(90) < 45  # half of the pairs share a text, and the model answers with it whatever it sees
    ids = np.where(frequent, 0, np.arange(90))
    text = np.where(frequent[:, None], one.text[0], one.text)
    image = np.repeat(one.text[:1], 90, axis=0)
    shuffled = told({"a": replace(one, image=image, text=text, text_ids=ids)}, shuffled=True)
    assert shuffled["control_at_chance"] is False
    assert shuffled["clients"]["a"]["i2t_recall@1"] == pytest.approx(0.5)
    assert shuffled["clients"]["a"]["intervals"]["recall@1"]["verdict"] == joint_verdict(shuffled) == ABOVE


@pytest.mark.parametrize("n", [4, 8, 12])
def test_no_hit_in_a_tiny_gallery_is_no_evidence(n: int) -> None:
    one = gallery("a", n, 1, 0.1)
    nothing = replace(one, image=-one.image)  # every picture is farthest from its own text
    about = told({"a": nothing})["clients"]["a"]
    assert about["i2t_recall@1"] == about["t2i_recall@1"] == 0
    interval = about["intervals"]["recall@1"]
    assert interval["low"] == 0 < interval["chance"] < interval["high"]
    assert interval["verdict"] == UNSURE


def test_no_hit_in_a_large_gallery_is_below_chance() -> None:
    one = gallery("a", 300, 1, 0.1)
    result = told({"a": replace(one, image=-one.image)})
    assert result["clients"]["a"]["intervals"]["recall@10"]["verdict"] == BELOW


def test_a_control_of_equal_embeddings_is_below_chance_and_says_so() -> None:
    one = gallery("a", 40, 1, 0.1)
    flat = np.repeat(one.text[:1], 40, axis=0)
    result = told({"a": replace(one, image=flat, text=flat)}, shuffled=True)
    assert joint_verdict(result) == BELOW
    assert result["control_at_chance"] is False


def test_the_control_judges_what_its_table_shows() -> None:
    """A held-out gallery that leaks fails the control, as its row says."""
    frequent = np.arange(90) < 45
    one = gallery("far", 90, 1, 0.1)
    leaks = replace(
        one,
        image=np.repeat(one.text[:1], 90, axis=0),
        text=np.where(frequent[:, None], one.text[0], one.text),
        text_ids=np.where(frequent, 0, np.arange(90)),
    )
    clients = {"a": gallery("a", 60, 2, 0.1), "b": gallery("b", 60, 3, 0.1)}
    assert told(clients, shuffled=True)["control_at_chance"] is True
    assert told(clients | {"far": leaks}, held_out=["far"], shuffled=True)["control_at_chance"] is False


def test_clients_with_their_own_models_have_no_pooled_gallery() -> None:
    clients = {"a": gallery("a", 30, 1, 0.3), "b": gallery("b", 30, 2, 0.3)}
    assert told(clients, shared=False)[POOLED] is None
    assert told({"a": clients["a"]})[POOLED] is None
    assert told(clients, shared=False, shuffled=True)["control_at_chance"] is True


def test_only_held_out_clients() -> None:
    result = told({"far": gallery("far", 30, 1, 0.3)}, held_out=["far"])
    assert result["mean"]["i2t_recall@1"] == result["clients"]["far"]["i2t_recall@1"]


def test_a_gallery_too_small_for_a_rank() -> None:
    result = told({"a": gallery("a", 4, 1, 0.1), "b": gallery("b", 30, 2, 0.1)})
    assert "i2t_recall@5" not in result["clients"]["a"]
    assert result["mean"]["i2t_recall@5"] == result["clients"]["b"]["i2t_recall@5"]
    assert result["worst_client"]["id"] == "b"
    alone = told({"a": gallery("a", 4, 1, 0.1)})
    assert alone["worst_client"] is None


def test_shuffling_moves_every_text_with_its_id() -> None:
    one = gallery("a", 25, 1, 0.1)
    moved = shuffle(one, 3)
    assert sorted(moved.text_ids) == sorted(one.text_ids)
    assert (moved.text_ids != one.text_ids).sum() > 15
    for i in range(25):
        assert (moved.text[i] == one.text[one.text_ids == moved.text_ids[i]][0]).all()
    assert (moved.image == one.image).all()


def test_joining_keeps_patients_of_different_clients_apart() -> None:
    joined = join([gallery("a", 4, 1, 0.1), gallery("b", 4, 2, 0.1)])
    assert len(joined) == 8
    assert len(set(joined.groups)) == 4
    assert joined.keys[0] == "a/0"
    without = replace(joined, infos=[{}] * 8)
    assert len(set(without.groups)) == 8


def test_intervals_resample_patients() -> None:
    one = gallery("a", 60, 1, 1.2)
    by_pair = retrieve(replace(one, infos=[{}] * 60), 400, 0).estimates[0]
    by_one = retrieve(replace(one, infos=[{"patient": "same"}] * 60), 400, 0).estimates[0]
    assert by_pair.low < by_pair.recall < by_pair.high
    assert (by_one.low, by_one.high, by_one.verdict) == (0.0, 1.0, UNSURE), "one patient says nothing"


def test_across_and_skill() -> None:
    assert across([{"i2t_recall@1": 0.2, "chance@1": 0.1}, {"i2t_recall@1": 0.6, "chance@1": 0.3}]) == {
        "mean": {"i2t_recall@1": pytest.approx(0.4), "chance@1": pytest.approx(0.2)},
        "worst": {"i2t_recall@1": 0.2},
        "spread": {"i2t_recall@1": pytest.approx(0.4)},
    }
    assert skill({"i2t_recall@5": 0.5, "t2i_recall@5": 0.7, "chance@5": 0.2}) == pytest.approx(0.5)
    assert skill({}) is None
    assert skill({"i2t_recall@5": 1.0, "t2i_recall@5": 1.0, "chance@5": 1.0}) is None


def test_pairs_of_a_study_match_where_the_json_says_so() -> None:
    one, other = gallery("a", 30, 1, 0.1), gallery("b", 30, 2, 0.1)
    crossed = [replace(g, image=g.image[[1, 0, *range(2, 30)]], match_by="study") for g in (one, other)]
    told_so = [
        replace(g, infos=[{"study": 0}, {"study": 0}, {"study": ""}, {"study": float("nan")}, *[{}] * 26])
        for g in crossed
    ]
    assert told_so[0].match_ids.tolist() == [0, 0, *[-1] * 28], "a gap is no study"
    for many, expected in ((crossed, 28 / 30), (told_so, 1.0)):
        result = told({"a": many[0], "b": many[1]})
        assert (
            result["clients"]["a"]["i2t_recall@1"] == result["clients"]["b"]["t2i_recall@1"] == pytest.approx(expected)
        )
        assert result[POOLED]["i2t_recall@1"] == pytest.approx(expected)
    assert len(set(join(told_so).match_ids.tolist())) == 3, "study 0 of one client is not that of another"
    assert value_of({"labels": {"age": 5}}, "age") == "5"
    assert value_of({"study": [1]}, "study") is None


def test_subgroups_by_word_and_by_quartile() -> None:
    ages = [None, *range(20, 79)]
    infos = [{"sex": "F" if i % 2 else "M", "labels": {"age": age}, "id": f"n{i}"} for i, age in enumerate(ages)]
    found = find_subgroups(infos, ["sex", "age"])
    assert found["sex"]["F"].tolist() == [i % 2 == 1 for i in range(60)]
    assert list(found["age"]) == ["20 to under 34.5", "34.5 to under 49", "49 to under 63.5", "63.5 to 78"]
    assert sum(mask.sum() for mask in found["age"].values()) == 59, "whose age is not known is in no subgroup"
    with pytest.raises(ValueError, match="--subgroup: no sample has a field ages; there are: age, id, sex"):
        find_subgroups(infos, ["ages"])
    with pytest.raises(ValueError, match="--subgroup: id has 60 values that are no numbers, more than 50 subgroups"):
        find_subgroups(infos, ["id"])


def test_the_worst_subgroup_is_named() -> None:
    rng = np.random.default_rng(0)
    good, far = gallery("a", 80, 1, 0.2), gallery("far", 40, 3, 0.2)
    of_women = np.arange(80) % 4 == 1
    image = np.where(of_women[:, None], rng.standard_normal(good.image.shape), good.image)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    infos = [{"patient": i, "sex": "F" if woman else "M"} for i, woman in enumerate(of_women)]
    good = replace(good, image=image.astype(np.float32), infos=infos)
    galleries = {"a": good, "b": gallery("b", 50, 2, 0.2), "far": far}
    masks = find_subgroups([info for g in galleries.values() for info in g.infos], ["sex"])
    result = measure_subgroups(galleries, ["far"], masks, one_model=True, draws=100, seed=0)
    together = join([good, galleries["b"]]).ranks
    for value, chosen in (("F", of_women), ("M", ~of_women)):
        about = result["fields"]["sex"][value]
        expected = together.hits("mean", 5)[:80][chosen].mean()
        assert about["recall@5"]["recall"] == pytest.approx(expected, abs=1e-12), "as queries in everybody's gallery"
        assert about["recall@5"]["low"] <= expected <= about["recall@5"]["high"]
        assert about["pairs"] == chosen.sum()
    assert (result["worst"]["field"], result["worst"]["value"]) == ("sex", "F")
    alone = measure_subgroups(galleries, ["far"], masks, one_model=False, draws=20, seed=0)
    expected = good.ranks.hits("mean", 5)[of_women].mean()
    assert alone["fields"]["sex"]["F"]["recall@5"]["recall"] == pytest.approx(expected), "each in its own gallery"


def test_two_models_on_the_same_pairs() -> None:
    first = {"a": gallery("a", 60, 1, 0.2), "b": gallery("b", 50, 2, 0.2)}
    second = {
        name: replace(g, image=gallery(name, 60 if name == "a" else 50, 9, 0.2).image) for name, g in first.items()
    }
    compare = lambda x, y: compare_retrieval(x, y, [], one_model=True, draws=100, seed=0)
    found = compare(first, second)
    assert list(found) == ["a", "b", POOLED]
    for name, by in (("a", lambda of: of["a"]), (POOLED, lambda of: join(list(of.values())))):
        about = found[name]["recall@5"]
        each = [by(of).ranks.hits("mean", 5).mean() for of in (first, second)]
        assert [about["first"], about["second"]] == pytest.approx(each, abs=1e-12)
        assert 0 < about["low"] < about["difference"] < about["high"]
        assert about["difference"] == pytest.approx(each[0] - each[1])
    assert compare(first, first)["a"]["recall@5"]["difference"] == 0
    with pytest.raises(ValueError, match="--compare: the two models do not read the same pairs of b"):
        compare(first, second | {"b": replace(second["b"], keys=second["b"].keys[::-1])})
    rng = np.random.default_rng(0)
    task = Task("odd", ("no odd", "odd"), True, np.arange(110) % 2)
    blind = rng.standard_normal((110, 2))
    sighted = blind + 2 * np.eye(2)[task.targets]
    scored = [[Scored(task, scores, 0.07)] for scores in (sighted, blind)]
    groups = [key for g in first.values() for key in g.groups]
    about = compare_zero_shot(scored[0], scored[1], groups, draws=100, seed=0)["odd"]
    assert 0 < about["low"] < about["difference"] < about["high"]
    assert about["first"] > 0.9 > 0.65 > about["second"]
