"""Measures of classification scores.

Legend: n pairs, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.metrics.intervals import binomial

NUM_BINS = 10  # of the calibration's diagram
_BATCH = 64  # resamplings held at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def measure(targets: Ints, scores: Floats) -> dict[str, float] | None:
    """auroc, auprc, f1, accuracy and balanced_accuracy of scores (n, C) for targets (n,), -1 left out; None for one class alone.

    Binary: AUROC and average precision of the margin scores[:, 1] − scores[:, 0], and F1 of class 1; else the mean over the
    classes that occur, of one against the rest. A row that is not finite counts as wrong: its own class comes last.
    """
    from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score  # late: takes seconds

    targets, scores = _known(targets, scores)
    present = np.unique(targets)
    if len(present) < 2:
        return None
    columns = _columns(targets, scores)
    binary = scores.shape[1] == 2
    # balanced_accuracy_score is the same figure, but warns of every predicted class that does not occur
    how: dict[str, Any] = {"labels": [1] if binary else present, "average": "macro", "zero_division": 0}
    counts = {"n": float(len(targets))}
    if binary:
        counts["positives"] = float((targets == 1).sum())
    return {
        "auroc": float(np.mean([roc_auc_score(is_class, column) for is_class, column in columns])),
        "auprc": float(np.mean([average_precision_score(is_class, column) for is_class, column in columns])),
        "f1": float(f1_score(targets, scores.argmax(1), **how)),
        "accuracy": float((targets == scores.argmax(1)).mean()),
        "balanced_accuracy": float(recall_score(targets, scores.argmax(1), **(how | {"labels": present}))),
        **counts,
    }


def calibration(targets: Ints, scores: Floats, temperature: float) -> dict[str, Any]:
    """How far the probabilities softmax(scores / temperature) are from frequencies, of scores (n, C) for targets (n,).

    ece: the expected calibration error of the most probable class, in NUM_BINS equal bins of its probability (Guo et al.
    2017). brier: the mean squared distance of the probabilities from the truth, for two classes that of class 1 alone.
    bins: {low, high, n, confidence, accuracy} of each bin that has a pair.
    """
    targets, scores = _known(targets, scores)
    exponents = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
    probable = exponents / exponents.sum(1, keepdims=True)
    confidence, right = probable.max(1), probable.argmax(1) == targets
    place = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    bins = [
        {
            "low": b / NUM_BINS,
            "high": (b + 1) / NUM_BINS,
            "n": int((place == b).sum()),
            "confidence": float(confidence[place == b].mean()),
            "accuracy": float(right[place == b].mean()),
        }
        for b in np.unique(place).tolist()
    ]
    squares = ((probable - np.eye(scores.shape[1])[targets]) ** 2).sum(1).mean() if len(targets) else 0.0
    return {
        "ece": sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / max(len(targets), 1),
        "brier": float(squares) / (2 if scores.shape[1] == 2 else 1),
        "bins": bins,
    }


def auroc_draws(targets: Ints, scores: Floats, groups: Sequence[object], draws: int, seed: int) -> Floats:
    """(draws,) AUROC as `measure` has it, over resamplings of whole groups (n keys); nan where only one class was drawn.

    Equal seeds and groups give equal resamplings, so that differences of two models' draws are paired.
    """
    _, member = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    num_groups, known = int(member.max()) + 1, targets >= 0
    columns = _columns(*_known(targets, scores))
    rng, out = np.random.default_rng(seed), []
    for start in range(0, draws, _BATCH):
        size = min(_BATCH, draws - start)
        counts = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size)
        weights = counts[:, member[known]].astype(np.float64)
        by_class = np.stack([_weighted_auroc(is_class, column, weights) for is_class, column in columns])
        there = ~np.isnan(by_class)
        with np.errstate(invalid="ignore"):
            out.append(np.where(there, by_class, 0).sum(0) / there.sum(0))
    return np.concatenate(out)


def auroc_interval(
    targets: Ints, scores: Floats, groups: Sequence[object], *, draws: int, seed: int, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of the AUROC over resamplings of whole groups; None where only one class occurs.

    Where all resamplings agree, as for a perfect order, the binomial interval of as many trials as the rarer side has pairs.
    """
    known, _ = _known(targets, scores)
    if len(np.unique(known)) < 2:
        return None
    drawn = auroc_draws(targets, scores, groups, draws, seed)
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) > 1 and np.ptp(drawn) > 1e-12:
        low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
        return float(low), float(high)
    value = float(drawn[0]) if len(drawn) else 0.5
    return binomial(value, int(np.unique(known, return_counts=True)[1].min()), level)


def _known(targets: Ints, scores: Floats) -> tuple[Ints, Floats]:
    """Those with a target; rows that are not finite have their own class last and all others first."""
    targets, scores = targets[targets >= 0], scores[targets >= 0]
    finite = np.isfinite(scores)
    if finite.all():
        return targets, scores
    low, high = (float(x) for x in (scores[finite].min(), scores[finite].max())) if finite.any() else (0.0, 0.0)
    own = np.arange(scores.shape[1]) == targets[:, None]
    return targets, np.where(finite.all(1, keepdims=True), scores, np.where(own, low - 1, high + 1))


def _columns(targets: Ints, scores: Floats) -> list[tuple[NDArray[np.bool_], Floats]]:
    """(whether it is the class, how much it looks like it) for the classes that occur; for two classes of the second alone."""
    if scores.shape[1] == 2:
        return [(targets == 1, scores[:, 1] - scores[:, 0])]
    return [(targets == c, scores[:, c]) for c in np.unique(targets).tolist()]


def _weighted_auroc(is_class: NDArray[np.bool_], column: Floats, weights: Floats) -> Floats:
    """(draws,) of weights (draws, n): the weighted share of ordered couples, ties a half; nan where one side has no weight."""
    order = np.argsort(column, kind="stable")
    starts = np.flatnonzero(np.diff(column[order], prepend=-np.inf))
    inside, outside = (
        np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (is_class, ~is_class)
    )
    below = np.cumsum(outside, axis=1) - outside / 2
    with np.errstate(invalid="ignore"):
        return (inside * below).sum(1) / (inside.sum(1) * outside.sum(1))
