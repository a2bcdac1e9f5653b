"""The robust weights of equation (4): exponentiated gradient ascent and the projection onto a χ² ball.

Pure numpy in float64: no torch, no process group. N is the number of clients, p, q, c, z are (N,) vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


def uniform_center(num_clients: int) -> Vector:
    """c = 1/N."""
    return np.full(num_clients, 1.0 / num_clients)


def samples_center(num_samples: Sequence[int]) -> Vector:
    """c_i = n_i / n."""
    counts = np.asarray(num_samples, dtype=np.float64)
    return counts / counts.sum()


def chi2_divergence(p: ArrayLike, center: ArrayLike | None = None) -> float:
    """D(p) = ½ Σ (p_i − c_i)² / c_i of equation (4)."""
    p64 = _vector(p, "p")
    c = _center(center, p64.size)
    return float(0.5 * np.sum((p64 - c) ** 2 / c))


def full_simplex_radius(center: ArrayLike) -> float:
    """Smallest ρ whose ball holds the whole simplex: max_i ½ (1/c_i − 1); (N − 1)/2 for uniform c."""
    c = _vector(center, "center")
    return float(np.max(0.5 * (1.0 / c - 1.0)))


def project_simplex(q: ArrayLike) -> Vector:
    """argmin ‖z − q‖² over the simplex. q: (N,) finite; returns (N,) float64."""
    q64 = _vector(q, "q")
    return _threshold(q64, np.ones_like(q64))


def project_chi2_ball(q: ArrayLike, radius: float, center: ArrayLike | None = None) -> Vector:
    """argmin ‖z − q‖² over P(ρ) of equation (4).

    q: (N,) any finite vector; radius: ρ ≥ 0; center: c on the simplex with c_i > 0, uniform where None.
    Returns (N,) float64: exactly c at ρ = 0, the plain simplex projection where the ball holds the whole simplex.
    Raises ValueError on non-finite q, negative ρ or a centre off the open simplex.
    """
    q64 = _vector(q, "q")
    c = _center(center, q64.size)
    if not radius >= 0:
        raise ValueError(f"radius must be ≥ 0, got {radius}")
    if radius == 0 or q64.size == 1:
        return c.copy()
    z = project_simplex(q64)
    if radius >= full_simplex_radius(c) or 0.5 * np.sum((z - c) ** 2 / c) <= radius:
        return z
    if np.ptp(c) == 0 and np.all(q64 >= 0) and abs(q64.sum() - 1) < 1e-12:
        # uniform c and q on the simplex: the segment from c to q stays on the simplex, so the projection is radial
        step = q64 - c
        return c + step * min(1.0, np.sqrt(2 * radius / c.size) / np.linalg.norm(step))

    # Stationarity at multiplier μ of the ball: z_i = a_i · max(0, q_i − t) with a_i = c_i / (c_i + μ); D falls with μ.
    def at(mu: float) -> Vector:
        return _threshold(q64, c / (c + mu))

    low, high = 0.0, 1.0
    while 0.5 * np.sum((at(high) - c) ** 2 / c) > radius:
        low, high = high, 4 * high
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if 0.5 * np.sum((at(middle) - c) ** 2 / c) > radius:
            low = middle
        else:
            high = middle
    return at(high)


def update_weights(
    p: ArrayLike, losses: ArrayLike, step_size: float, radius: float, center: ArrayLike | None = None
) -> Vector:
    """One round of equation (4): q_i ∝ p_i exp(η L_i), then the projection onto P(ρ).

    p: (N,) weights of the round that ended; losses: (N,) L_i; step_size: η. Returns the next p, (N,) float64.
    Raises ValueError on a non-finite loss (naming its index), a negative weight or unequal lengths.
    """
    p64, l64 = _vector(p, "p"), np.asarray(losses, dtype=np.float64)
    if l64.shape != p64.shape:
        raise ValueError(f"p has {p64.size} weights and losses has shape {l64.shape}")
    bad = np.flatnonzero(~np.isfinite(l64))
    if bad.size:
        raise ValueError(f"losses[{bad[0]}] is {l64[bad[0]]}; every client's loss must be finite")
    if np.any(p64 < 0) or p64.sum() <= 0:
        raise ValueError(f"p must be ≥ 0 with a positive sum, got {p64}")
    with np.errstate(divide="ignore"):  # log 0 = −inf keeps a zero weight at zero
        log_q = np.log(p64) + step_size * (l64 - l64.max())
    q = np.exp(log_q - log_q.max())
    return project_chi2_ball(q / q.sum(), radius, center)


def _threshold(q: Vector, a: Vector) -> Vector:
    """z_i = a_i max(0, q_i − t) with t such that Σ z_i = 1 (a_i > 0)."""
    q = q - q.max()  # t absorbs a shift; so a huge q keeps its differences
    order = np.argsort(-q, kind="stable")
    qs, a_sum = q[order], np.cumsum(a[order])
    t = (np.cumsum(a[order] * qs) - 1.0) / a_sum
    active = np.flatnonzero(qs > t)[-1]  # the first is always active: a_1 q_1 − a_1 t = 1
    z = a * np.maximum(0.0, q - t[active])
    return z / z.sum()


def _vector(value: ArrayLike, name: str) -> Vector:
    vector = np.asarray(value, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be a vector with one entry per client, got shape {vector.shape}")
    if not np.all(np.isfinite(vector)):
        raise ValueError(f"{name} must be finite, got {vector}")
    return vector


def _center(center: ArrayLike | None, size: int) -> Vector:
    if center is None:
        return uniform_center(size)
    c = _vector(center, "center")
    if c.size != size:
        raise ValueError(f"center has {c.size} entries for {size} clients")
    if np.any(c <= 0) or abs(c.sum() - 1) > 1e-9:
        raise ValueError(f"center must be > 0 and sum to 1, got {c}")
    return c
