"""How sure a measured number is: resampling by groups, the binomial interval, Student's, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    found = _percentile(values, groups, draws, seed, level)
    return found or binomial(float(values.mean()), len({str(g) for g in groups}), level)


def paired_bootstrap(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    groups: Sequence[object],
    *,
    draws: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean of `first` − `second` (n,), values in [0, 1], resampling whole groups of both alike.

    Where all resamplings agree, as many trials as groups that all agreed bound what was missed (binomial), each way. Raises
    what bootstrap raises.
    """
    difference = first - second
    if len(difference) == 0 or draws < 1:
        raise ValueError(f"bootstrap: needs values and draws, got {len(difference)} values and {draws} draws")
    found = _percentile(difference, groups, draws, seed, level)
    if found is not None:
        return found
    mean, missed = float(difference.mean()), binomial(0.0, len({str(g) for g in groups}), level)[1]
    return max(-1.0, mean - missed), min(1.0, mean + missed)


def _percentile(
    values: NDArray[np.float64], groups: Sequence[object], draws: int, seed: int, level: float
) -> tuple[float, float] | None:
    """None where the resamplings have no spread, as of one group."""
    from scipy import stats  # late: its import takes most of a second

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
    return None


def binomial(share: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share of `trials`; one between two counts takes the wider end of each."""
    from scipy import stats  # late: its import takes most of a second

    hits = round(share * trials, 9)
    few, many = (
        stats.binomtest(count, trials).proportion_ci(level, method="exact")
        for count in (math.floor(hits), math.ceil(hits))
    )
    return float(few.low), float(many.high)


@dataclass(frozen=True)
class Mean:
    """A mean over n repetitions with its t-interval, which n = 1 does not have. p_value: two-sided, of a mean of 0."""

    n: int
    mean: float
    low: float | None
    high: float | None
    p_value: float | None


def t_interval(values: Sequence[float], level: float = 0.95) -> Mean:
    """Student's interval of the mean of independent values. For a paired comparison give the differences.

    Values without spread have an interval of width 0 and a p-value of 0 (1 where they are all 0). Raises ValueError for
    no values.
    """
    from scipy import stats  # late: its import takes most of a second

    n = len(values)
    if n == 0:
        raise ValueError("t_interval: there are no values")
    mean = float(np.mean(values))
    if n == 1:
        return Mean(1, mean, None, None, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    scale = float(np.max(np.abs(values)))
    if error <= 1e-12 * max(scale, 1.0):  # what rounding leaves of equal values
        return Mean(n, mean, mean, mean, 1.0 if abs(mean) <= 1e-12 else 0.0)
    return Mean(n, mean, mean - half, mean + half, 2 * float(stats.t.sf(abs(mean) / error, n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being many (Holm 1979): the chance of any false alarm is at most the adjusted level."""
    out = [0.0] * len(p_values)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = least
    return out
