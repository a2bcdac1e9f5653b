"""AUROC and balanced accuracy against plain loops."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest

from feddra_ds.metrics.classification import auroc_draws, auroc_interval, calibration, measure


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_are_those_of_plain_loops(classes: int) -> None:
    rng = np.random.default_rng(classes)
    for _ in range(20):
        targets = rng.integers(-1, classes, 30)
        targets[targets == 1] = 0 if classes > 2 else 1  # a class that is predicted and never occurs
        scores = rng.standard_normal((30, classes))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = measure(targets, scores)
        known = targets >= 0
        y, s = targets[known], scores[known]
        present = sorted(set(y.tolist()))
        assert found is not None
        recalls = [np.mean([s[i].argmax() == c for i in np.flatnonzero(y == c)]) for c in present]
        assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)
        of = {c: s[:, c] for c in present} if classes > 2 else {1: s[:, 1] - s[:, 0]}
        areas = [np.mean([a > b for a, b in product(v[y == c], v[y != c])]) for c, v in of.items()]
        assert found["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
        assert found["n"] == len(y)
        assert found.get("positives") == (float((y == 1).sum()) if classes == 2 else None)


def test_one_class_alone_cannot_be_told_apart() -> None:
    assert measure(np.array([1, 1, -1]), np.eye(3)[:, :2]) is None


def test_more_measures_are_scikit_learns() -> None:
    from sklearn.metrics import average_precision_score, brier_score_loss, f1_score

    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, 80)
    scores = rng.standard_normal((80, 2)) / 10
    scores[np.arange(80), targets] += 0.05
    found = measure(targets, scores)
    assert found is not None
    margin = scores[:, 1] - scores[:, 0]
    assert found["auprc"] == pytest.approx(average_precision_score(targets, margin), abs=1e-12)
    assert found["f1"] == pytest.approx(f1_score(targets, margin > 0), abs=1e-12)
    probable = 1 / (1 + np.exp(-margin / 0.07))
    told = calibration(targets, scores, 0.07)
    assert told["brier"] == pytest.approx(brier_score_loss(targets, probable), abs=1e-12)
    assert sum(b["n"] for b in told["bins"]) == 80
    gaps = 0.0
    sure = np.maximum(probable, 1 - probable)
    for b in range(10):
        chosen = (sure >= b / 10) & (sure < (b + 1) / 10 + (b == 9))
        if chosen.any():
            gaps += abs(sure[chosen].sum() - ((probable > 0.5) == targets)[chosen].sum())
    assert told["ece"] == pytest.approx(gaps / 80, abs=1e-12)
    targets = rng.integers(0, 3, 60)
    several = measure(targets, scores := rng.standard_normal((60, 3)))
    assert several is not None
    assert several["f1"] == pytest.approx(f1_score(targets, scores.argmax(1), average="macro"))
    by_class = [average_precision_score(targets == c, scores[:, c]) for c in range(3)]
    assert several["auprc"] == pytest.approx(np.mean(by_class))


@pytest.mark.parametrize("classes", [2, 3])
def test_resampled_auroc_is_scikit_learns_with_weights(classes: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(2)
    targets, scores = rng.integers(-1, classes, 70), rng.integers(0, 6, (70, classes)) / 3  # with ties
    groups = (np.arange(70) // 2).tolist()
    drawn = auroc_draws(targets, scores, groups, 70, 5)
    counts = np.concatenate([np.random.default_rng(5).multinomial(35, np.full(35, 1 / 35), 64)])
    member = np.unique([str(g) for g in groups], return_inverse=True)[1]
    known = targets >= 0
    for i in (0, 1, 63):
        w = counts[i][member][known]
        y, s = targets[known], scores[known]
        columns = [(y == 1, s[:, 1] - s[:, 0])] if classes == 2 else [(y == c, s[:, c]) for c in range(classes)]
        expected = np.mean([roc_auc_score(is_class, column, sample_weight=w) for is_class, column in columns])
        assert drawn[i] == pytest.approx(expected, abs=1e-9)
    assert len(drawn) == 70
    low, high = auroc_interval(targets, scores, groups, draws=200, seed=0) or (0, 0)
    found = measure(targets, scores)
    assert found is not None
    assert low < found["auroc"] < high
    perfect = auroc_interval(np.array([0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1]], range(4), draws=50, seed=0)
    assert perfect == (pytest.approx(0.025**0.5), 1.0), "two pairs a side prove little"


@pytest.mark.parametrize("classes", [2, 3])
def test_rows_that_are_not_finite_are_wrong(classes: int) -> None:
    targets = np.arange(30) % classes
    scores = np.eye(classes)[targets]
    best = measure(targets, scores)
    one = scores.copy()
    one[0, 0] = np.nan
    spoilt, nothing = measure(targets, one), measure(targets, np.full_like(scores, np.nan))
    assert best is not None
    assert spoilt is not None
    assert nothing is not None
    assert best["auroc"] == best["accuracy"] == best["balanced_accuracy"] == 1
    assert all(spoilt[key] < 1 for key in ("auroc", "auprc", "f1", "accuracy", "balanced_accuracy"))
    assert nothing["auroc"] == nothing["accuracy"] == nothing["balanced_accuracy"] == nothing["f1"] == 0
    assert spoilt["accuracy"] == pytest.approx(29 / 30)
    told = calibration(targets, np.full_like(scores, np.nan), 0.07)
    assert told["ece"] == pytest.approx(1 / (classes - 1)), "all that it believes is shared by the wrong classes"
