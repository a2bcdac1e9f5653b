"""Robust rules against plain NumPy, and what bad clients can do to each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feddra_ds.config.schema import AggregateConfig
from feddra_ds.federation.aggregation.held import judge
from feddra_ds.federation.aggregation.rules import (
    cosines,
    krum_scores,
    multi_krum,
    num_trimmed,
    trimmed_mean,
    weighted_median,
)

SHAPES = [(3, 7), (4, 50), (5, 50), (8, 33), (1, 4), (2, 9)]


def drawn(shape: tuple[int, int], *, uneven: bool) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(7)
    values = draw.normal(size=shape).astype(np.float32)
    values[:, 0], values[:2, 1:4] = 1.5, -3.0  # ties
    weights = draw.uniform(0.1, 1, shape[0]) if uneven else np.full(shape[0], 1 / shape[0])
    return values, weights


def median_by_hand(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """By definition, coordinate by coordinate: the middle of all m with Σ_(x < m) w ≤ ½ and Σ_(x > m) w ≤ ½."""
    out = []
    for column in values.T.astype(np.float64):
        half = weights.sum() / 2 * (1 + 1e-9)
        fits = [x for x in column if weights[column < x].sum() <= half and weights[column > x].sum() <= half]
        out.append((min(fits) + max(fits)) / 2)
    return np.array(out)


def trimmed_by_hand(values: np.ndarray, weights: np.ndarray, num: int) -> np.ndarray:
    out = []
    for column in values.T.astype(np.float64):
        kept = np.argsort(column, kind="stable")[num : len(column) - num]
        out.append(np.average(column[kept], weights=weights[kept]))
    return np.array(out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("uneven", [False, True])
def test_rules_of_coordinates(shape: tuple[int, int], uneven: bool) -> None:
    values, weights = drawn(shape, uneven=uneven)
    tensors = torch.from_numpy(values), torch.from_numpy(weights)
    median = weighted_median(*tensors).numpy()
    np.testing.assert_allclose(median, median_by_hand(values, weights), rtol=1e-6, atol=1e-6)
    if not uneven:
        np.testing.assert_allclose(median, np.median(values, axis=0), rtol=1e-6, atol=1e-6)
    for trim in (0.1, 0.2, 0.45):
        expected = trimmed_by_hand(values, weights, num_trimmed(shape[0], trim))
        np.testing.assert_allclose(trimmed_mean(*tensors, trim).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_how_many_are_trimmed() -> None:
    told = {
        (5, 0.2): 1,
        (10, 0.2): 2,
        (3, 0.2): 1,
        (4, 0.01): 1,
        (100, 0.07): 7,
        (3, 0.45): 1,
        (6, 0.45): 2,
        (1, 0.4): 0,
        (2, 0.4): 0,
    }
    assert {key: num_trimmed(*key) for key in told} == told


def products_of(updates: np.ndarray) -> np.ndarray:
    return updates.astype(np.float64) @ updates.astype(np.float64).T


def honest(num: int, size: int = 400) -> np.ndarray:
    draw = np.random.default_rng(11)
    return draw.normal(size=size) + draw.normal(size=(num, size))


def test_krum_by_its_definition() -> None:
    updates = np.concatenate([honest(5), 40 * honest(1)])
    for num_bad in (1, 2):
        expected = []
        for i in range(6):
            squares = sorted(((updates[i] - updates[j]) ** 2).sum() for j in range(6) if j != i)
            expected.append(sum(squares[: 6 - num_bad - 2]))
        np.testing.assert_allclose(krum_scores(products_of(updates), num_bad), expected, rtol=1e-9)
        chosen, _ = multi_krum(products_of(updates), num_bad)
        assert len(chosen) == 6 - num_bad
        assert 5 not in chosen
    assert multi_krum(products_of(updates[:2]), 1)[0] == [0], "of two equally far ones the first"
    assert multi_krum(products_of(updates[:1]), 1)[0] == [0]


def test_cosines_to_the_others_do_not_follow_the_longest() -> None:
    good = honest(5)
    updates = np.concatenate([good, -1e6 * good.mean(0, keepdims=True), np.zeros((1, good.shape[1]))])
    found = cosines(products_of(updates))
    assert (found[:5] > 0.3).all()
    assert found[5] < -0.6
    assert found[6] == 0
    unit = good / np.linalg.norm(good, axis=1, keepdims=True)
    others = np.array([np.median(np.delete(row, i)) for i, row in enumerate(unit @ unit.T)])
    np.testing.assert_allclose(cosines(products_of(good)), others, rtol=1e-9)


@pytest.mark.parametrize("rule", ["mean", "krum"])
def test_who_is_judged_and_by_which_figure(rule: str) -> None:
    good = honest(5)
    products = products_of(np.concatenate([-good.mean(0, keepdims=True), good]))
    weights = [0.3, 0.1, 0.2, 0.1, 0.2, 0.1]
    indices = [2, 4, 5, 6, 8, 9]
    found = judge(AggregateConfig(rule=rule, min_cosine=0.0), indices, weights, products, 1.0)
    assert found.included == indices[1:], "the one found by its cosine is the one that Krum would have left out"
    assert found.total_weight == pytest.approx(0.7)
    (reason,) = found.excluded.values()
    assert "aggregate.min_cosine = 0" in reason
    assert f"{found.cosines[2]:.3f}" in reason
    told = judge(AggregateConfig(rule=rule, min_cosine=-1.0, num_bad=1), indices, weights, products, 1.0)
    if rule == "mean":
        assert (told.included, told.total_weight, told.excluded) == (indices, 1.0, {})
    else:
        (excluded,) = told.excluded
        assert excluded == 2
        assert "Krum score" in told.excluded[excluded]
    assert told.cosines.keys() == set(indices)


# how far what a rule gives may lie from the good clients' mean, in standard deviations of one of them
@pytest.mark.parametrize("attack", ["sign", "large", "noise", "zero", "same place"])
@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_one_of_five_cannot_bend_a_coordinate(rule: str, attack: str) -> None:
    good = honest(4, 4000)
    bad = {
        "sign": -good.mean(0), "large": 1000 * good[0], "noise": 100 * np.random.default_rng(1).normal(size=4000),
        "zero": np.zeros(4000), "same place": np.full(4000, 3e38),
    }[attack]  # fmt: skip
    values = torch.from_numpy(np.concatenate([good, bad[None]]).astype(np.float32))
    weights = torch.tensor([0.2, 0.1, 0.2, 0.1, 0.4])  # the bad one has most
    new = weighted_median(values, weights) if rule == "median" else trimmed_mean(values, weights, 0.2)
    low, high = good.min(0) - 1e-6, good.max(0) + 1e-6
    assert ((new.numpy() >= low) & (new.numpy() <= high)).all(), "between the good clients'"
