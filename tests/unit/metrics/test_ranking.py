"""Ranks, recall, chance and the bootstrap, against plain loops and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from feddra_ds.metrics.intervals import binomial, bootstrap
from feddra_ds.metrics.ranking import Ranks, Side, rank_table, ranks, recall_table


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def with_copies(copies: np.ndarray, num_texts: int) -> Ranks:
    """Ranks of pairs of which each has so many copies of its text, its own included."""
    n, nothing = len(copies), np.zeros(len(copies), int)
    return Ranks(Side(nothing, nothing, np.ones(n, int), num_texts), Side(nothing, nothing, copies, n))


def test_ranks_against_a_plain_loop_over_more_rows_than_a_block() -> None:
    rng = np.random.default_rng(0)
    n = 700
    ids = rng.integers(0, 500, n)
    image, text = unit(rng, n, 8), unit(rng, 500, 8)[ids]
    found = ranks(image, text, ids)
    scores = image @ text.T
    for j in (0, 17, 511, 512, 699):
        match = ids == ids[j]
        nearer = ~match & (scores[j] >= scores[j][match].max())
        assert found.i2t.better[j] == len(np.unique(ids[nearer])), "copies of a text are one entry of the gallery"
        assert found.t2i.better[j] == (scores[:, j][~match] >= scores[:, j][match].max()).sum()
        assert found.t2i.matches[j] == match.sum()
    assert found.num_texts == len(np.unique(ids))


def test_a_tie_counts_against_the_match() -> None:
    same = np.ones((4, 3)) / np.sqrt(3)
    table = recall_table(ranks(same, same, np.arange(4)))
    assert table["i2t_recall@1"] == table["t2i_recall@1"] == 0
    assert table["chance@1"] == pytest.approx(0.25)
    assert "i2t_recall@5" not in table, "four pairs are no gallery for five results"
    assert table["pairs"] == 4


def by_brute_force(image: np.ndarray, text: np.ndarray, ids: np.ndarray, study: np.ndarray) -> dict[str, float]:
    """Recall, chance, median rank and mAP by sorting and by scikit-learn."""
    from sklearn.metrics import average_precision_score

    distinct = np.unique(ids)
    texts = np.stack([text[ids == t][0] for t in distinct])
    match = np.array([[any(ids[m] == t and (m == j or study[m] == study[j] >= 0) for m in range(len(ids))) for t in distinct]
                      for j in range(len(ids))])  # fmt: skip
    scores = image @ texts.T
    of_text = np.searchsorted(distinct, ids)
    out: dict[str, float] = {}
    for way, s, right in (("i2t", scores, match), ("t2i", scores.T[of_text], match.T[of_text])):
        orders = [np.argsort(-row, kind="stable") for row in s]
        best = np.array([right[j][order].argmax() for j, order in enumerate(orders)])
        for k in (1, 5, 10):
            out[f"{way}_recall@{k}"] = (best < k).mean()
        out[f"{way}_median_rank"] = float(np.median(best) + 1)
        out[f"{way}_map"] = float(np.mean([average_precision_score(right[j], s[j]) for j in range(len(s))]))
    for k in (1, 5, 10):
        ways = [(right.sum(1), right.shape[1]) for right in (match, match.T[of_text])]
        missed = [math.comb(size - m, k) / math.comb(size, k) for many, size in ways for m in many]
        out[f"chance@{k}"] = 1 - float(np.mean(missed))
    return out


@pytest.mark.parametrize("with_studies", [False, True])
def test_all_numbers_are_those_of_brute_force_and_scikit_learn(with_studies: bool) -> None:
    rng = np.random.default_rng(7)
    n = 60
    ids = rng.integers(0, 45, n) * 7
    study = rng.integers(-1, 25, n) if with_studies else np.full(n, -1)
    text = unit(rng, 400, 6)[ids]
    image = text + 0.7 * rng.standard_normal((n, 6))
    found = ranks(image, text, ids, study)
    expected = by_brute_force(image, text, ids, study)
    told = recall_table(found) | rank_table(found)
    for key, value in expected.items():
        assert told[key] == pytest.approx(value, abs=1e-9), key
    assert set(told) == {*expected, "pairs"}


def test_a_match_of_a_study_counts_both_ways() -> None:
    rng = np.random.default_rng(3)
    text = unit(rng, 20, 8)
    image = text[[1, 0, *range(2, 20)]]  # the first two pictures lie at each other's text
    apart, together = (ranks(image, text, np.arange(20), np.array([s, s, *[-1] * 18])) for s in (-1, 0))
    assert recall_table(apart)["i2t_recall@1"] == recall_table(apart)["t2i_recall@1"] == 0.9
    assert recall_table(together)["i2t_recall@1"] == recall_table(together)["t2i_recall@1"] == 1
    assert together.i2t.matches[:3].tolist() == together.t2i.matches[:3].tolist() == [2, 2, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_ranks_last(value: float) -> None:
    text = unit(np.random.default_rng(4), 30, 8)
    ids = np.array([0, 0, *range(2, 30)])
    text[1] = text[0]
    nothing = np.full_like(text, value)
    for image, words in ((nothing, text), (text, nothing), (nothing, nothing)):
        told = recall_table(ranks(image, words, ids)) | rank_table(ranks(image, words, ids))
        assert all(told[f"{way}_recall@{k}"] == 0 for way in ("i2t", "t2i") for k in (1, 5, 10))
        assert told["i2t_median_rank"] == 29
    spoilt = text.copy()
    spoilt[5, 2] = value
    found = ranks(spoilt, text, ids)
    assert found.i2t.better[5] == 28, "its text comes after all others"
    assert found.t2i.better[5] == 29, "it is found after all others"
    assert np.delete(found.i2t.better, 5).max() == 0
    assert np.delete(found.t2i.better, 5).max() == 0, "it is in nobody's way"


def test_chance_equals_random_orders() -> None:
    rng = np.random.default_rng(1)
    ids = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    n = len(ids)
    found = with_copies(np.array([(ids == i).sum() for i in ids]), len(np.unique(ids)))
    texts = np.unique(ids)
    for k in found.cutoffs:
        by_text = [[(ids[rng.permutation(n)[:k]] == ids[j]).any() for j in range(n)] for _ in range(4000)]
        by_image = [[ids[j] in rng.permutation(texts)[:k] for j in range(n)] for _ in range(1000)]
        assert found.chance(k).mean() == pytest.approx((np.mean(by_text) + np.mean(by_image)) / 2, abs=0.01)


@pytest.mark.parametrize("n", [12, 700, 40000])
def test_chance_is_the_share_of_all_orders(n: int) -> None:
    positives = np.array([1, 2, 5, 11])
    gallery = np.concatenate([np.repeat(m, m) for m in positives] + [np.ones(n, int)])[:n]
    found = with_copies(gallery, round((1 / gallery).sum()))
    for k in found.cutoffs:
        for m, chance in zip(gallery[:19], found.chance(k), strict=False):
            t2i = 1 - math.comb(n - m, k) / math.comb(n, k)
            assert chance == pytest.approx((k / found.num_texts + t2i) / 2, rel=1e-12)


def test_hits_of_both_ways_are_their_mean() -> None:
    sides = (Side(np.array(better), np.ones(3), np.ones(3, int), 20) for better in ([0, 4, 9], [2, 0, 0]))
    found = Ranks(*sides)
    assert found.hits("mean", 1).tolist() == [0.5, 0.5, 0.5]
    assert found.hits("i2t", 5).tolist() == [1, 1, 0]


def test_the_bootstrap_covers_the_truth_and_widens_with_groups() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        values = rng.normal(1.0, 1.0, 60)
        low, high = bootstrap(values, range(60), draws=300, seed=seed)
        covered += low <= 1.0 <= high
    assert 180 <= covered <= 199
    repeated = np.repeat(rng.normal(0, 1, 20), 10)
    alone = bootstrap(repeated, range(200), draws=500, seed=0)
    grouped = bootstrap(repeated, np.repeat(np.arange(20), 10).tolist(), draws=500, seed=0)
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0]), "ten copies of a value are no ten pieces of evidence"
    assert bootstrap(repeated, range(200), draws=50, seed=3) == bootstrap(repeated, range(200), draws=50, seed=3)


@pytest.mark.parametrize("num_groups", [2, 9, 400])
def test_the_bootstrap_is_a_plain_loop_over_groups(num_groups: int) -> None:
    rng = np.random.default_rng(3)
    values, groups = rng.integers(0, 3, 500) / 2, rng.integers(0, num_groups, 500)
    _, member = np.unique(groups, return_inverse=True)
    drawn, means = np.random.default_rng(5), []
    for _ in range(150):
        chosen = drawn.integers(member.max() + 1, size=member.max() + 1)
        means.append(np.mean(np.concatenate([values[member == g] for g in chosen])))
    expected = np.quantile(means, [0.05, 0.95])
    assert bootstrap(values, [f"{g:03d}" for g in groups], draws=150, seed=5, level=0.9) == pytest.approx(expected)


def test_values_that_are_all_the_same_have_the_binomial_interval_of_their_groups() -> None:
    low, high = bootstrap(np.zeros(12), np.arange(12) // 2, draws=50, seed=0)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 6))), "six patients, none of them found"
    low, high = bootstrap(np.ones(12), range(12), draws=50, seed=0)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 12)), 1.0)
    assert bootstrap(np.zeros(6), range(6), draws=1, seed=0) == binomial(0.0, 6), "one resampling has no spread"
    assert bootstrap(np.array([0.0, 0.5, 1.0]), ["one"] * 3, draws=50, seed=0) == (0.0, 1.0), "one patient says nothing"


def test_the_binomial_interval_contains_a_share_between_two_counts() -> None:
    for share in (0.0, 0.1, 0.5, 0.95, 1.0):
        low, high = binomial(share, 7)
        assert low <= share <= high
    low, high = binomial(3 / 7, 7)
    assert (low, high) == (pytest.approx(0.0990, abs=1e-4), pytest.approx(0.8159, abs=1e-4))


@pytest.mark.parametrize(("n", "draws"), [(0, 10), (3, 0)])
def test_the_bootstrap_refuses_nothing(n: int, draws: int) -> None:
    with pytest.raises(ValueError, match="bootstrap: needs values and draws"):
        bootstrap(np.zeros(n), range(n), draws=draws, seed=0)
