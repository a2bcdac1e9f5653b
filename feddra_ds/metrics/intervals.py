"""How sure a measured share is: resampling by groups, and the binomial interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bootstrap(
    values: NDArray[np.float64], groups: Sequence[object], *, draws: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n,), resampling whole groups: pairs of one patient or of one text
    are no independent evidence. groups: n keys. Values in [0, 1] of which every resampling has the same mean (no hit in
    a small gallery) say nothing about their spread: they get the binomial interval of as many trials as groups.
    Raises ValueError for no values or no draws."""
    if len(values) == 0 or draws < 1:
        raise ValueError(f"bootstrap: needs values and draws, got {len(values)} values and {draws} draws")
    _, member = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(len(sums), size=len(sums))
        means[draw] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    if high - low < 1e-12:
        return binomial(float(values.mean()), len(sums), level)
    return float(low), float(high)


def binomial(share: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share of `trials`; one between two counts takes the wider end of each."""
    from scipy.stats import binomtest  # late: training needs ranks, not intervals

    hits = round(share * trials, 9)
    sides = [binomtest(count, trials).proportion_ci(level) for count in (math.floor(hits), math.ceil(hits))]
    return float(sides[0].low), float(sides[1].high)
