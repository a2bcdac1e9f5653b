"""AUROC and balanced accuracy against plain loops."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest

from feddra_ds.metrics.classification import measure


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
