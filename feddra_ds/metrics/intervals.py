"""How sure a measured share is: resampling by groups, and the binomial interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_BATCH = 64  # resamplings that scipy holds at a time


def bootstrap(
    values: NDArray[np.float64], groups: Sequence[object], *, draws: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n,), resampling whole groups, as pairs of one patient or of one text
    are not independent evidence. groups: n keys. Values in [0, 1] of which every resampling has the same mean (no hit in
    a small gallery) say nothing about their spread: they get the binomial interval of as many trials as groups.
    Raises ValueError for no values or no draws."""
    if len(values) == 0 or draws < 1:
        raise ValueError(f"bootstrap: needs values and draws, got {len(values)} values and {draws} draws")
    _, member = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    if len(sums) > 1 and draws > 1:  # one group or one resampling has no spread
        found = stats.bootstrap(
            (sums, sizes),
            lambda s, n, axis: s.sum(axis) / n.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=draws,
            batch=_BATCH,
            method="percentile",
            confidence_level=level,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        if found.high - found.low >= 1e-12:
            return float(found.low), float(found.high)
    return binomial(float(values.mean()), len(sums), level)


def binomial(share: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share of `trials`; one between two counts takes the wider end of each."""
    hits = round(share * trials, 9)
    few, many = (
        stats.binomtest(count, trials).proportion_ci(level, method="exact")
        for count in (math.floor(hits), math.ceil(hits))
    )
    return float(few.low), float(many.high)
