"""The sets in which the robust weights p may move, and the steps that move p in them: equation (4) and its kin.

Pure numpy and scipy in float64: no torch, no process group. scipy is imported where it is used, as that takes as long as
all the checks of a config. N is the number of clients; p, q, c, z are (N,) vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
SetKind = Literal["chi2", "kl", "cvar", "simplex"]
Ascent = Literal["projected", "from_center", "closed_form", "exponentiated"]
ASCENTS: tuple[str, ...] = get_args(Ascent)

_ROUNDING = 1e-9  # how far a given sum, bound or divergence may be off before it is an error


@dataclass(frozen=True, eq=False)
class MixtureSet:
    """Where p may move: {p : Σ p = 1, divergence(p) ≤ radius, minimum·c_i ≤ p_i ≤ maximum·c_i}, with c the centre.

    kind: chi2 and kl are balls; cvar lets no p_i exceed (1 + radius)·c_i, so that the worst mixture is the mean over the
    worst 1/(1 + radius) of the pairs; simplex knows no radius.
    center: (N,), > 0, sums to 1. maximum: None for no bound.
    Raises ValueError, which names the argument, on a radius < 0, a minimum outside [0, 1] or a maximum < 1.

    Wherever `kept` is an argument, it is (N,), NaN where p_i is free and elsewhere the value that p_i keeps (a client
    without a loss this round). The sum and the ball hold for all N together; ValueError where no p does both.
    """

    kind: SetKind
    radius: float
    center: Vector
    minimum: float = 0.0
    maximum: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("chi2", "kl", "cvar", "simplex"):
            raise ValueError(f"kind must be chi2, kl, cvar or simplex, got {self.kind!r}")
        if not self.radius >= 0:
            raise ValueError(f"radius must be ≥ 0, got {self.radius}")
        if not 0 <= self.minimum <= 1:
            raise ValueError(f"minimum must lie in [0, 1], got {self.minimum}")
        if self.maximum is not None and not self.maximum >= 1:
            raise ValueError(f"maximum must be ≥ 1, got {self.maximum}")
        c = vector_of(self.center, "center")
        if np.any(c <= 0) or abs(c.sum() - 1) > _ROUNDING:
            raise ValueError(f"center must be > 0 and sum to 1, got {c}")
        object.__setattr__(self, "center", c)

    def divergence(self, p: ArrayLike) -> float:
        """chi2: ½ Σ (p_i − c_i)²/c_i; kl: Σ p_i log(p_i/c_i); cvar: max p_i/c_i − 1; simplex: 0."""
        p64, c = vector_of(p, "p"), self.center
        if p64.size != c.size:
            raise ValueError(f"p has {p64.size} weights and center {c.size}")
        excess = (p64 - c) / c
        if self.kind == "chi2":
            return float(0.5 * np.sum(c * excess**2))
        if self.kind == "kl":
            from scipy.special import xlog1py

            # r log r − (r − 1), whose second part sums to 0, keeps its digits near r = 1
            return float(np.sum(c * (xlog1py(1 + excess, excess) - excess)))
        return float(max(0.0, excess.max())) if self.kind == "cvar" else 0.0

    @cached_property
    def full_radius(self) -> float:
        """The smallest radius whose set holds the whole simplex."""
        rarest = 1.0 / float(self.center.min())
        return {"chi2": 0.5 * (rarest - 1), "kl": float(np.log(rarest)), "cvar": rarest - 1, "simplex": 0.0}[self.kind]

    @property
    def is_point(self) -> bool:
        """Whether the centre is all there is."""
        pinned = self.kind != "simplex" and self.radius == 0
        return pinned or self.minimum == 1 or self._ceiling == 1 or self.center.size == 1

    def among(self, members: ArrayLike) -> MixtureSet:
        """The set of some of the clients alone: the same rule around their part of the centre. members: (N,) bool."""
        part = self.center[np.asarray(members, dtype=bool)]
        return self if part.size == self.center.size else replace(self, center=part / part.sum())

    def project(self, q: ArrayLike, *, kept: ArrayLike | None = None) -> Vector:
        """argmin ‖z − q‖² over the set. q: (N,), any finite vector. Returns (N,) float64; exactly c at radius 0."""
        q64 = vector_of(q, "q")
        if q64.size != self.center.size:
            raise ValueError(f"center has {self.center.size} entries for {q64.size} clients")
        if kept is not None:
            return self._with_kept(kept, lambda free, mass, inner: inner.project(q64[free] / mass))
        radial = self._radial(q64)
        # Σ z = 1 absorbs a shift of q, and so a huge q keeps its differences
        return self._optimum(q64 - q64.max(), 1.0) if radial is None else radial

    def worst(self, losses: ArrayLike, *, kept: ArrayLike | None = None) -> Vector:
        """argmax z·losses over the set, (N,) float64; equal losses share in proportion to the centre."""
        if kept is not None:
            values = np.asarray(losses, dtype=np.float64)
            return self._with_kept(kept, lambda free, _, inner: inner.worst(values[free]))
        values = _losses(losses, self.center.size)
        spread = float(np.ptp(values))
        return self._optimum((values - values.max()) / spread, 0.0) if spread > 0 else self.center.copy()

    def step(
        self,
        p: ArrayLike,
        losses: ArrayLike,
        *,
        step_size: float,
        ascent: Ascent,
        kept: ArrayLike | None = None,
    ) -> Vector:
        """The next p, (N,) float64, from the losses L of the round that ended. η is step_size ≥ 0.

        projected: project(p + η L) = argmax z·L − ‖z − p‖²/2η. from_center: project(c + η L), which forgets the rounds
        before, and with them their noise. closed_form: worst(L), which is either of them at η = ∞.
        exponentiated: project(q), q_i ∝ p_i exp(η L_i), which leaves a weight of 0 at 0 unless minimum lifts it.
        Where `kept` has a value, the loss is not read. Raises ValueError on a loss that is not finite (by its index).
        """
        p64 = vector_of(p, "p")
        fixed = np.full(p64.size, np.nan) if kept is None else np.asarray(kept, dtype=np.float64)
        free = np.isnan(fixed)
        values = np.asarray(losses, dtype=np.float64)
        if values.shape != p64.shape:
            raise ValueError(f"p has {p64.size} weights and losses has shape {values.shape}")
        values = _losses(np.where(free, values, 0.0), p64.size)
        if not step_size >= 0:
            raise ValueError(f"step_size must be ≥ 0, got {step_size}")
        if ascent not in ASCENTS:
            raise ValueError(f"ascent must be one of {', '.join(ASCENTS)}, got {ascent!r}")
        if np.any(p64 < 0) or p64.sum() <= 0:
            raise ValueError(f"p must be ≥ 0 with a positive sum, got {p64}")
        if not free.any():
            return self.project(p64, kept=kept)
        top = values[free].max()
        with np.errstate(over="ignore", invalid="ignore"):
            rise = np.where(free & (values != top), step_size * (values - top), 0.0)
        if ascent == "closed_form" or (ascent != "exponentiated" and not np.isfinite(rise).all()):
            return self.worst(values, kept=kept)
        if ascent != "exponentiated":
            return self.project((p64 if ascent == "projected" else self.center) + rise, kept=kept)
        if p64[free].sum() <= 0:  # nothing to multiply
            return self.project(p64, kept=kept)
        with np.errstate(divide="ignore"):  # log 0 = −inf keeps a zero weight at zero
            log_q = np.where(free, np.log(p64) + rise, -np.inf)
        best = log_q.max()
        q = np.exp(log_q - best) if np.isfinite(best) else np.where(free & (p64 > 0), p64, 0.0)
        mass = 1.0 - fixed[~free].sum()
        return self.project(mass * (q / q.sum()), kept=kept)

    def reach(self) -> tuple[Vector, Vector]:
        """(smallest, largest) p_i that the set allows each client, two (N,) vectors."""
        c = self.center
        if self.is_point:
            return c.copy(), c.copy()
        # With p_i = t the others do best, in the ball and in their bounds alike, in proportion to the centre.
        most = min(self._ceiling, 1.0 / float(c.min()))
        low = np.maximum(self.minimum * c, 1 - most * (1 - c))
        high = np.minimum(np.minimum(most * c, 1.0), 1 - self.minimum * (1 - c))
        if self.kind == "chi2":
            way = np.sqrt(2 * self.radius * c * (1 - c))
            return np.maximum(low, c - way), np.minimum(high, c + way)
        if self.kind == "kl":
            return self._reach_kl(low), self._reach_kl(high)
        return low, high

    def _reach_kl(self, end: Vector) -> Vector:
        """The point farthest from c towards `end` (N,) where the two-part divergence is still within the radius."""
        from scipy.special import xlogy

        c = self.center
        near, far = np.zeros_like(c), np.ones_like(c)
        for _ in range(60):
            middle = 0.5 * (near + far)
            t = c + middle * (end - c)
            inside = xlogy(t, t / c) + xlogy(1 - t, (1 - t) / (1 - c)) <= self.radius
            near, far = np.where(inside, middle, near), np.where(inside, far, middle)
        return c + np.where(far == 1.0, 1.0, near) * (end - c)

    # ---- the solver
    @property
    def _ceiling(self) -> float:
        """Largest p_i/c_i that a bound allows."""
        given = np.inf if self.maximum is None else self.maximum
        return float(min(given, 1 + self.radius)) if self.kind == "cvar" else float(given)

    @property
    def _is_ball(self) -> bool:
        return self.kind in ("chi2", "kl")

    @cached_property
    def _bounds(self) -> tuple[Vector, Vector]:
        return self.minimum * self.center, np.minimum(self._ceiling * self.center, 1.0)

    def _radial(self, q: Vector) -> Vector | None:
        """For a χ² ball with a uniform centre and q on the simplex: the segment from c to q stays on the simplex, so
        the projection is where it leaves the ball, if the bounds hold there. None where this does not apply."""
        c = self.center
        if self.kind != "chi2" or self.is_point or np.ptp(c) > 0 or np.any(q < 0) or abs(q.sum() - 1) > 1e-12:
            return None
        step = q - c
        distance = np.linalg.norm(step)
        most = np.sqrt(2 * self.radius / c.size)
        z = q / q.sum() if distance <= most else c + step * (most / distance)
        low, high = self._bounds
        return z if np.all((z >= low) & (z <= high)) else None

    def _with_kept(self, kept: ArrayLike, solve: Callable[[NDArray[np.bool_], float, MixtureSet], Vector]) -> Vector:
        """What `solve(free, mass, set)` gives for the free clients, as shares of the mass that the kept leave them.

        Both balls split: with the free ones at s·c, s = mass/Σ c, as the nearest point, what is left of the radius is
        a ball of the same kind around the free clients' own centre, rescaled to sum 1.
        """
        fixed = np.asarray(kept, dtype=np.float64)
        c, size = self.center, self.center.size
        if fixed.shape != (size,):
            raise ValueError(f"kept has shape {fixed.shape} for {size} clients")
        free = np.isnan(fixed)
        if free.all():
            return solve(free, 1.0, self)
        held = fixed[~free]
        low, high = self._bounds
        if np.any(held < low[~free] - _ROUNDING) or np.any(held > high[~free] + _ROUNDING):
            raise ValueError(f"kept has weights outside of the bounds of the set: {held}")
        mass = 1.0 - float(held.sum())
        if mass < -_ROUNDING or (not free.any() and mass > _ROUNDING):
            raise ValueError(f"kept sums to {held.sum()}, which leaves {mass:g} to the {free.sum()} others")
        out = fixed.copy()
        if mass <= 0 or not free.any():
            out[free] = 0.0
        share = float(c[free].sum())
        scale = max(mass, 0.0) / share if free.any() else 1.0
        if not self.minimum - _ROUNDING <= scale <= self._ceiling + _ROUNDING:
            raise ValueError(
                f"kept leaves {mass:g} to the others, {scale:g} times their centre: no weights are in bounds"
            )
        out[free] = scale * c[free]
        left = self.radius - (self.divergence(out) if self._is_ball else 0.0)
        if left < -_ROUNDING * (1 + self.radius):
            raise ValueError(f"kept alone is at divergence {self.radius - left:g}, beyond the radius {self.radius:g}")
        if mass <= 0 or not free.any():
            return out
        inner = replace(
            self,
            kind=self.kind if self._is_ball else "simplex",
            radius=max(0.0, left) * (share / mass**2 if self.kind == "chi2" else 1 / mass),
            center=c[free] / share,
            minimum=min(1.0, self.minimum / scale),
            maximum=max(1.0, self._ceiling / scale),
        )
        out[free] = mass * solve(free, mass, inner)
        return out

    def _optimum(self, gain: Vector, curvature: float) -> Vector:
        """argmax z·gain − curvature ‖z‖²/2 over the set: the projection of `gain` at curvature 1, the worst mixture at 0.

        Lagrange: the same without the ball, minus μ·D(z), for the μ ≥ 0 at which D(z) = radius.
        """
        if self.is_point:
            return self.center.copy()
        plain = self._balanced(gain, curvature, 0.0) if curvature else self._linear(gain)
        if not self._is_ball or self.divergence(plain) <= self.radius:
            return plain

        def excess(log_mu: float) -> float:
            divergence = self.divergence(self._balanced(gain, curvature, float(np.exp(log_mu))))
            return float(np.log(max(divergence, 1e-300) / self.radius))

        from scipy.optimize import brentq

        # beyond this μ no |z_i/c_i − 1| can exceed √(2 radius)
        high = float(np.log(np.ptp(gain - curvature * self.center)) - 0.5 * np.log(2 * self.radius))
        stride = 1.0
        while excess(high) > 0:
            high += stride
            if high > 700:  # a radius below the rounding of c
                return self.center.copy()
        low = high - stride
        while excess(low) < 0:
            stride *= 2
            low, high = low - stride, low
            if low < -700:  # the ball is touched, not cut
                return plain
        root = brentq(excess, low, high, xtol=1e-15, rtol=1e-15)
        return self._balanced(gain, curvature, float(np.exp(root)))

    def _linear(self, gain: Vector) -> Vector:
        """argmax z·gain within the bounds alone: the ceiling for the largest, the floor for the smallest, and the clients
        equal to the one at which the mass runs out share what is left in proportion to the centre."""
        c = self.center
        low, high = self._bounds
        order = np.argsort(-gain, kind="stable")
        filled = np.cumsum((high - low)[order])
        last = order[min(int(np.searchsorted(filled, 1 - low.sum())), c.size - 1)]
        z = np.where(gain > gain[last], high, low)
        tied = gain == gain[last]
        z[tied] = (1 - z[~tied].sum()) * c[tied] / c[tied].sum()
        return np.clip(z, low, high)

    def _balanced(self, gain: Vector, curvature: float, mu: float) -> Vector:
        """argmax z·gain − curvature ‖z‖²/2 − mu·D(z) within the bounds, Σ z = 1.

        By Newton's method, safeguarded by a bracket, for the ν at which clip(stationary(gain − ν)) sums to 1.
        """
        c = self.center
        floor, ceiling = self._bounds
        start = gain - curvature * c
        low, high = float(start.min()), float(start.max())  # at low every z_i ≥ c_i, at high every z_i ≤ c_i,
        low, high = low - 4 * np.spacing(abs(low)), high + 4 * np.spacing(abs(high))  # whatever their rounding
        below, missing = c, 0.0  # z at high, and by how much its sum is too small
        nu, before = high, np.inf
        for _ in range(300):
            free, slope = self._stationary(gain - nu, curvature, mu)
            z = np.clip(free, floor, ceiling)
            miss = float(np.sum(z - c))
            if abs(miss) <= 1e-15:
                return z
            if miss > 0:
                low = nu
            else:
                high, below, missing = nu, z, -miss
            total = float(np.sum(slope[(free > floor) & (free < ceiling)]))
            change = np.log1p(miss) * (1 + miss) if self.kind == "kl" and miss > 0 else miss
            newton = nu + change / total if total > 0 else np.nan
            halved, before = abs(miss) <= 0.5 * before, abs(miss)
            nu = newton if low < newton < high and halved else 0.5 * (low + high)
            if not low < nu < high:
                break
        # low and high are neighbouring floats, too coarse for a sum of 1: the point between theirs
        above = np.clip(self._stationary(gain - low, curvature, mu)[0], floor, ceiling)
        surplus = float(np.sum(above - c))
        if surplus + missing <= 0:
            return above
        return np.clip((missing * above + surplus * below) / (surplus + missing), floor, ceiling)

    def _stationary(self, rise: Vector, curvature: float, mu: float) -> tuple[Vector, Vector]:
        """(z, dz/drise) with curvature·z + mu·D'(z) = rise, where D' is measured from its value at the centre."""
        c = self.center
        if self.kind == "kl" and mu > 0:
            from scipy.special import wrightomega

            with np.errstate(over="ignore", invalid="ignore"):
                z = mu * wrightomega(rise / mu + np.log(c / mu)) if curvature else np.zeros_like(c)
                # log(z/c) is (rise − z)/μ, the more exact way to z where μ is large
                z = np.where(curvature * z < mu, c * np.exp((rise - curvature * z) / mu), z)
                return z, z / (curvature * z + mu)
        slope = c / (curvature * c + mu)
        return c + slope * (rise - curvature * c), slope


def vector_of(value: ArrayLike, name: str) -> Vector:
    """(N,) float64. Raises ValueError, with the name, on another shape or a number that is not finite."""
    vector = np.asarray(value, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be a vector with one entry per client, got shape {vector.shape}")
    if not np.all(np.isfinite(vector)):
        raise ValueError(f"{name} must be finite, got {vector}")
    return vector


def _losses(losses: ArrayLike, size: int) -> Vector:
    values = np.asarray(losses, dtype=np.float64)
    if values.shape != (size,):
        raise ValueError(f"losses has shape {values.shape} for {size} clients")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(f"losses[{bad[0]}] is {values[bad[0]]}; every client's loss must be finite")
    return values
