"""The robust weights p of equation (4): their centres, the reports they may follow, the gain they attain.

Where p may move, and how, is `mixture_set`. N is the number of clients; p, q, c, z are (N,) float64 vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import TypedDict

from feddra_ds.strategies.mixture_set import Ascent, MixtureSet, SetKind, Vector, vector_of


def uniform_center(num_clients: int) -> Vector:
    """c = 1/N."""
    return np.full(num_clients, 1.0 / num_clients)


def samples_center(num_samples: Sequence[int]) -> Vector:
    """c_i = n_i / n."""
    counts = np.asarray(num_samples, dtype=np.float64)
    return counts / counts.sum()


def set_around(
    center: Vector, kind: SetKind, radius: float, radius_share: float | None, *, minimum: float, maximum: float | None
) -> MixtureSet:
    """The set of the config's section `dro`: radius_share, where it is not None, is the radius in units of full_radius."""
    if radius_share is not None:
        radius = radius_share * MixtureSet(kind, 0.0, center).full_radius
    return MixtureSet(kind, radius, center, minimum, maximum)


def never_zero(weights: Vector, center: Vector) -> Vector:
    """`weights` with each 0 replaced by 2⁻⁴⁰ of the centre, (N,): nothing beside a client that has weight, in fp32, but
    where none of those that are left has any, their average is that of the centre."""
    return np.where(weights > 0, weights, np.ldexp(center, -40))


def believable(losses: Sequence[float | None], chance: float) -> Vector:
    """What of the reported losses p may follow, (N,): at most `chance`, the loss of a model that knows nothing.

    NaN, so that p_i is kept, for a loss that is missing (None), not finite or negative. So no report moves p further than
    one at chance.
    """
    values = np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64)
    return np.where(np.isfinite(values) & (values >= 0), np.minimum(values, chance), np.nan)


class RobustGain(TypedDict):
    """What p makes of the losses. Each but the share is a loss: Σ over the clients that have one of a weight times L_i."""

    mixture: float
    """Weighted with p."""
    mean: float
    """Weighted with the centre c (the plain mean where it is uniform)."""
    best: float
    """Weighted with the worst mixture of the set: the most that p could reach."""
    share: float | None
    """(mixture − mean)/(best − mean); None where all losses are equal and there is nothing to gain."""


def robust_gain(p: ArrayLike, losses: ArrayLike, mixture_set: MixtureSet) -> RobustGain | None:
    """How much of the gain that the set offers p attains. p, losses: (N,). None where no client has a loss.

    Clients whose loss is NaN are left out: p, the centre and the set are those of the others, rescaled to sum 1 (p is the
    centre where the others have weight 0).
    """
    p64, values = vector_of(p, "p"), np.asarray(losses, dtype=np.float64)
    if values.shape != p64.shape:
        raise ValueError(f"p has {p64.size} weights and losses has shape {values.shape}")
    known = ~np.isnan(values)
    if not known.any():
        return None
    values, among = values[known], mixture_set.among(known)
    mass = p64[known].sum()
    weights = p64[known] / mass if mass > 0 else among.center
    mixture, mean, best = (float(w @ values) for w in (weights, among.center, among.worst(values)))
    share = (mixture - mean) / (best - mean) if best - mean > 1e-12 * max(1.0, abs(mean)) else None
    return {"mixture": mixture, "mean": mean, "best": best, "share": share}


# ---- the χ² ball, by itself
def chi2_divergence(p: ArrayLike, center: ArrayLike | None = None) -> float:
    """D(p) = ½ Σ (p_i − c_i)² / c_i of equation (4)."""
    p64 = vector_of(p, "p")
    return _chi2_ball(p64, 0.0, center).divergence(p64)


def full_simplex_radius(center: ArrayLike) -> float:
    """Smallest ρ whose χ² ball holds the whole simplex: max_i ½ (1/c_i − 1); (N − 1)/2 for uniform c."""
    return MixtureSet("chi2", 0.0, vector_of(center, "center")).full_radius


def project_simplex(q: ArrayLike) -> Vector:
    """argmin ‖z − q‖² over the simplex. q: (N,) finite; returns (N,) float64."""
    q64 = vector_of(q, "q")
    return MixtureSet("simplex", 0.0, uniform_center(q64.size)).project(q64)


def project_chi2_ball(
    q: ArrayLike,
    radius: float,
    center: ArrayLike | None = None,
    *,
    minimum: float = 0.0,
    maximum: float | None = None,
) -> Vector:
    """argmin ‖z − q‖² over P(ρ) of equation (4), with minimum·c_i ≤ z_i ≤ maximum·c_i.

    q: (N,) any finite vector; radius: ρ ≥ 0; center: c on the simplex with c_i > 0, uniform where None.
    Returns (N,) float64: exactly c at ρ = 0, the plain simplex projection where the ball holds the whole simplex.
    Raises ValueError on non-finite q, negative ρ, a centre off the open simplex, a minimum outside [0, 1], a maximum < 1.
    """
    q64 = vector_of(q, "q")
    return _chi2_ball(q64, radius, center, minimum, maximum).project(q64)


def update_weights(
    p: ArrayLike,
    losses: ArrayLike,
    step_size: float,
    radius: float,
    center: ArrayLike | None = None,
    *,
    ascent: Ascent = "exponentiated",
    minimum: float = 0.0,
    maximum: float | None = None,
) -> Vector:
    """One round of equation (4) on P(ρ): `MixtureSet.step` for the χ² ball.

    p: (N,) weights of the round that ended; losses: (N,) L_i; step_size: η. Returns the next p, (N,) float64.
    Raises ValueError on a non-finite loss (naming its index), a negative weight or unequal lengths.
    """
    p64 = vector_of(p, "p")
    ball = _chi2_ball(p64, radius, center, minimum, maximum)
    return ball.step(p64, losses, step_size=step_size, ascent=ascent)


def _chi2_ball(
    p: Vector, radius: float, center: ArrayLike | None, minimum: float = 0.0, maximum: float | None = None
) -> MixtureSet:
    c = uniform_center(p.size) if center is None else vector_of(center, "center")
    if c.size != p.size:
        raise ValueError(f"center has {c.size} entries for {p.size} clients")
    return MixtureSet("chi2", radius, c, minimum, maximum)
