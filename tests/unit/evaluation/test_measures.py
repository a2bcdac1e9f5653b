"""What `evaluate` measures, on galleries whose answer is known: perfect, blind, shuffled, and one that leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from feddra_ds.evaluation.gallery import Gallery
from feddra_ds.evaluation.retrieval import across, join, measure_retrieval, retrieve, shuffle, skill
from feddra_ds.evaluation.verdict import ABOVE, BELOW, POOLED, UNSURE, joint_verdict


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
