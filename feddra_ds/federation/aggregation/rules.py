"""Rules of aggregation that a minority of bad clients cannot bend: pure functions, of values or of inner products.

Legend: n clients, c coordinates, f clients that are assumed to be bad, Δ_i = θ_i − θ_g the update of client i, G_ij = Δ_i·Δ_j.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
_ROUNDING = 1e-6  # of a sum of fp32 weights: below it a sum is one half


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """(n, c) fp32 values and (n,) weights above 0 → (c,): of each coordinate, where half of the weight lies on either side.

    Where that is a whole interval, its middle: with equal weights it is the median as everybody knows it. Coordinate-wise
    median: Yin et al. 2018, arXiv 1803.01498.
    """
    ordered, order = values.sort(dim=0)
    up_to = (weights / weights.sum()).float()[order].cumsum(dim=0)
    last = len(values) - 1
    low = (up_to < 0.5 - _ROUNDING).sum(dim=0, keepdim=True).clamp_(max=last)
    high = (up_to < 0.5 + _ROUNDING).sum(dim=0, keepdim=True).clamp_(max=last)
    return ordered.gather(0, low).lerp_(ordered.gather(0, high), 0.5)[0]


def num_trimmed(num_clients: int, trim: float) -> int:
    """How many of n values are left out at each end: ⌈trim · n⌉, but one value stays, or two where n is even."""
    return min(math.ceil(trim * num_clients - 1e-9), (num_clients - 1) // 2)


def trimmed_mean(values: Tensor, weights: Tensor, trim: float) -> Tensor:
    """(n, c) fp32 values and (n,) weights above 0 → (c,): of each coordinate the weighted mean without its extremes.

    The extremes are counted by clients, not by weight: a bad client of large weight is one. Of equal values the first row's is
    the smaller. Yin et al. 2018, arXiv 1803.01498.
    """
    out = num_trimmed(len(values), trim)
    ordered, order = values.sort(dim=0, stable=True)
    kept = slice(out, len(values) - out)
    shares = weights.float()[order[kept]]
    return (ordered[kept] * shares).sum(dim=0) / shares.sum(dim=0)


def cosines(products: Matrix) -> NDArray[np.float64]:
    """(n, n) G → (n,): the median of the cosines between an update and each of the others.

    It lies near that with the others' common direction as long as most of them have one, whatever the norms of the rest: a
    direction that is summed up follows the longest update. 0 for an update of norm 0, and where there are no others.
    """
    norms = np.sqrt(np.diag(products).clip(min=0.0))
    scale = np.outer(norms, norms)
    every = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    others = [np.delete(row, i) for i, row in enumerate(every)]
    return np.array([float(np.median(row)) if len(row) else 0.0 for row in others])


def krum_scores(products: Matrix, num_bad: int) -> NDArray[np.float64]:
    """(n, n) G → (n,): the sum of an update's squared distances to the n − f − 2 that are nearest to it.

    Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant gradient descent", who need n > 2 f + 2;
    below f + 3 it is the distance to the nearest.
    """
    squares = np.diag(products)
    distances = (squares[:, None] + squares[None, :] - 2 * products).clip(min=0.0)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, : max(1, len(products) - num_bad - 2)]
    return nearest.sum(axis=1) if len(products) > 1 else np.zeros(len(products))


def multi_krum(products: Matrix, num_bad: int) -> tuple[list[int], NDArray[np.float64]]:
    """(n, n) G → the n − f updates of lowest score, in order, and all scores. Of equal scores the first one's counts."""
    scores = krum_scores(products, num_bad)
    chosen = np.argsort(scores, kind="stable")[: max(1, len(scores) - num_bad)]
    return sorted(chosen.tolist()), scores
