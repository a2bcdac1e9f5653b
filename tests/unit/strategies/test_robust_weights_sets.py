"""Sets of mixtures and the steps in them: optimality by KKT residual and by an independent solver, and what the steps are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from feddra_ds.strategies import robust_weights
from feddra_ds.strategies.mixture_set import MixtureSet, Vector

KINDS = ("chi2", "kl", "cvar", "simplex")
NAN = float("nan")
ASCENTS = ("projected", "from_center", "closed_form", "exponentiated")


def ceiling_of(inside: MixtureSet) -> float:
    given = np.inf if inside.maximum is None else inside.maximum
    return min(given, 1 + inside.radius) if inside.kind == "cvar" else given


def infeasible(z: Vector, inside: MixtureSet) -> float:
    """How far z is off Σ z = 1, the bounds (relative to the centre) and the radius (relative)."""
    c = inside.center
    out = max(abs(z.sum() - 1), (inside.minimum - z / c).max(), (z / c / ceiling_of(inside) - 1).max(), -z.min())
    if inside.kind in ("chi2", "kl") and inside.radius > 0:
        out = max(out, inside.divergence(z) / inside.radius - 1)
    return float(out)


def kkt_residual(z: Vector, gain: Vector, curvature: float, inside: MixtureSet, kept: Vector | None = None) -> float:
    """Feasibility, and stationarity of argmax z·gain − curvature ‖z‖²/2, in units of the gain's spread and the multiplier.

    There must be μ ≥ 0 (0 inside the ball) with h_i = gain_i − curvature z_i − μ D'_i(z_i) at most ν below the ceiling, at
    least ν above the floor.
    """
    c = inside.center
    free = np.ones(z.size, bool) if kept is None else np.isnan(kept)
    edge = np.minimum(1e-12 * c, 1e-12)
    seen = free & (z > 1e-250)  # below, the KL divergence's slope is lost
    may_rise, may_fall = (
        seen & (z < np.minimum(ceiling_of(inside) * c, 1) - edge),
        seen & (z > inside.minimum * c + edge),
    )
    gap = gain - gain[free].max() - curvature * z
    slope = np.log(np.where(seen, z, 1) / c) if inside.kind == "kl" else (z - c) / c
    scale, steep = 1e-300 + np.ptp(gap[free]), 1e-300 + np.abs(slope[seen]).max()

    def off(mu: float) -> float:
        h = gap - mu * slope
        if not may_rise.any() or not may_fall.any():
            return 0.0
        return max(0.0, h[may_rise].max() - h[may_fall].min()) / (curvature + scale + mu)

    best = off(0.0)
    on_the_ball = inside.kind in ("chi2", "kl") and inside.divergence(z) >= inside.radius * (1 - 1e-9) - 1e-15
    both = may_rise & may_fall
    if on_the_ball and both.sum() >= 2:
        design = np.stack([slope[both] / steep, np.ones(both.sum())], axis=1)
        mu = np.linalg.lstsq(design, gap[both] / scale, rcond=None)[0][0] * scale / steep
        best = min(best, off(max(mu, 0.0)))
    if on_the_ball and best > 1e-10:  # few interior clients leave μ open: the best one, by a linear program
        rows, right = [], []
        for mask, sign in ((may_rise, 1), (may_fall, -1)):
            rows.append(np.stack([-sign * slope[mask] / steep, np.full(mask.sum(), -sign), np.full(mask.sum(), -1)], 1))
            right.append(-sign * gap[mask] / scale)
        found = linprog(
            [0, 0, 1], np.concatenate(rows), np.concatenate(right), bounds=[(0, None), (None, None), (0, None)]
        )
        best = min(best, off(found.x[0] * scale / steep))
    return max(infeasible(z, inside), best)


def centers(n: int, rng: np.random.Generator) -> Iterator[Vector]:
    """Uniform, like hospitals of different size, and very lopsided."""
    yield robust_weights.uniform_center(n)
    yield robust_weights.samples_center(rng.integers(200, 2000, n).tolist())
    lopsided = rng.random(n) ** 8 + 1e-4
    yield lopsided / lopsided.sum()


def random_set(rng: np.random.Generator, n: int, smallest_radius: float = 1e-12) -> MixtureSet:
    return MixtureSet(
        str(rng.choice(KINDS)),  # type: ignore[arg-type]
        float(10 ** rng.uniform(np.log10(smallest_radius), 3)),
        list(centers(n, rng))[rng.integers(3)],
        minimum=float(rng.choice([0, 0, 1e-3, rng.random()])),
        maximum=None if rng.random() < 0.5 else float(1 + 10 ** rng.uniform(-3, 2)),
    )


def random_gain(rng: np.random.Generator, n: int) -> Vector:
    gain = rng.normal(size=n) * 10 ** rng.uniform(-6, rng.choice([3, 30]))
    return np.round(3 * gain / np.abs(gain).max()) if rng.random() < 0.2 else gain  # with ties


def relative(losses: Vector) -> Vector:
    return (losses - losses.max()) / max(float(np.ptp(losses)), 1e-300)


# ---- exact
@pytest.mark.parametrize("seed", range(4))
def test_projection_and_worst_mixture_meet_kkt(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(250):
        n = int(rng.integers(2, 65))
        inside, q = random_set(rng, n), random_gain(rng, n)
        assert kkt_residual(inside.project(q), q, 1.0, inside) <= 1e-9, (inside, q)
        assert kkt_residual(inside.worst(q), relative(q), 0.0, inside) <= 1e-9, (inside, q)


def test_kept_weights_share_the_sum_and_the_ball() -> None:
    rng = np.random.default_rng(7)
    for _ in range(400):
        n = int(rng.integers(2, 30))
        inside, q = random_set(rng, n, smallest_radius=1e-6), random_gain(rng, n)
        p = inside.project(rng.dirichlet(np.ones(n)))
        kept = np.where(rng.random(n) < 0.4, p, np.nan)
        kept[rng.integers(n)] = np.nan
        losses = np.where(np.isnan(kept), q, np.nan)
        free = np.isnan(kept)
        for z, gain, curvature in (
            (inside.project(q, kept=kept), q, 1.0),
            (inside.worst(losses, kept=kept), np.where(free, relative(q[free]).min(), 0.0), 0.0),
        ):
            if curvature == 0:
                gain[free] = relative(q[free])
            assert np.array_equal(z[~free], p[~free])
            assert kkt_residual(z, gain, curvature, inside, kept) <= 1e-9, (inside, q, kept)
        for ascent in ASCENTS:
            z = inside.step(p, losses, step_size=0.5, ascent=ascent, kept=kept)  # type: ignore[arg-type]
            assert np.array_equal(z[~free], p[~free])
            assert infeasible(z, inside) <= 1e-9
        assert np.array_equal(inside.project(q, kept=np.full(n, np.nan)), inside.project(q))


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_clients(kind: str) -> None:
    rng, n = np.random.default_rng(3), 10_000
    for scale in (1e-3, 1.0, 1e30):
        inside = MixtureSet(kind, 1.0, rng.dirichlet(np.full(n, 2.0)) * 0.9 + 0.1 / n, 0.1, 20.0)  # type: ignore[arg-type]
        q = rng.normal(size=n) * scale
        z, worst = inside.project(q), inside.worst(q)
        assert kkt_residual(z, q, 1.0, inside) <= 1e-9
        assert kkt_residual(worst, relative(q), 0.0, inside) <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [(0.0, None), (0.2, None), (0.0, 1.8), (0.2, 1.8)])
def test_an_independent_solver_finds_nothing_better(kind: str, bounds: tuple[float, float | None]) -> None:
    rng = np.random.default_rng(11)
    c = np.array([0.4, 0.3, 0.2, 0.1])
    for radius in (0.02, 0.3):
        inside = MixtureSet(kind, radius, c, *bounds)  # type: ignore[arg-type]
        ceiling = min(ceiling_of(inside), 1e9)
        ball = [
            {"type": "ineq", "fun": lambda p, inside=inside: inside.radius - inside.divergence(np.maximum(p, 1e-12))}
        ]
        limits = [(max(inside.minimum * x, 1e-12), min(1.0, ceiling * x)) for x in c]
        for q in (rng.normal(size=4), np.array([1.0, 1.0, 0.0, 0.5])):
            for ours, loss in (
                (inside.project(q), lambda p, q=q: 0.5 * np.sum((p - q) ** 2)),
                (inside.worst(q), lambda p, q=q: -float(p @ q)),
            ):
                found = minimize(
                    loss,
                    c,
                    method="SLSQP",
                    bounds=limits,
                    constraints=[
                        {"type": "eq", "fun": lambda p: p.sum() - 1},
                        *(ball if kind in ("chi2", "kl") else []),
                    ],
                    options={"ftol": 1e-14, "maxiter": 500},
                )
                assert loss(ours) <= found.fun + 1e-7
                np.testing.assert_allclose(loss(ours), found.fun, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reach_is_what_the_worst_mixture_of_one_client_gives(kind: str) -> None:
    rng = np.random.default_rng(5)
    for n in (1, 2, 3, 7):
        for c in centers(n, rng):
            for radius in (0.0, 0.01, 0.5, 40.0):
                for bounds in ((0.0, None), (0.3, None), (0.0, 1.5), (0.3, 1.5)):
                    inside = MixtureSet(kind, radius, c, *bounds)  # type: ignore[arg-type]
                    low, high = inside.reach()
                    for i, axis in enumerate(np.eye(n)):
                        assert high[i] == pytest.approx(inside.worst(axis)[i], abs=1e-12)
                        assert low[i] == pytest.approx(inside.worst(-axis)[i], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_radius_below_rounding_is_no_endless_search(kind: str) -> None:
    c = np.array([0.4, 0.3, 0.2, 0.1])
    for radius in (1e-300, 1e-40, 1e-31, 1e-20):
        inside = MixtureSet(kind, radius, c, 0.1)  # type: ignore[arg-type]
        for z in (inside.project([1.0, 2.0, -3.0, 1e30]), inside.worst([1.0, 2.0, -3.0, 4.0])):
            if kind != "simplex":
                np.testing.assert_allclose(z, c, atol=1e-9)
        kept = [NAN, 0.3, NAN, NAN]
        if kind != "simplex":
            np.testing.assert_allclose(inside.worst([1.0, NAN, -3.0, 4.0], kept=kept), c, atol=1e-9)


def test_full_radius_holds_every_vertex_and_no_smaller_one_does() -> None:
    c = np.array([0.5, 0.3, 0.15, 0.05])
    for kind in ("chi2", "kl", "cvar"):
        full = MixtureSet(kind, 0.0, c).full_radius  # type: ignore[arg-type]
        for radius, all_in in ((full * (1 + 1e-12), True), (full * 0.99, False)):
            inside = MixtureSet(kind, radius, c)  # type: ignore[arg-type]
            largest = inside.reach()[1]
            assert bool(np.all(largest >= 1 - 1e-9)) is all_in, kind
        rarest = np.array([0, 0, 0, 1.0])
        assert MixtureSet(kind, full, c).divergence(rarest) == pytest.approx(full)  # type: ignore[arg-type]
    assert MixtureSet("simplex", 0.0, c).full_radius == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_pins_p_gives_the_centre_to_the_bit(kind: str) -> None:
    c = robust_weights.samples_center([3, 1, 7])
    pinned = [MixtureSet(kind, 5.0, c, 1.0), MixtureSet(kind, 5.0, c, maximum=1.0)]  # type: ignore[arg-type]
    if kind != "simplex":
        pinned.append(MixtureSet(kind, 0.0, c))  # type: ignore[arg-type]
    for inside in pinned:
        assert np.array_equal(inside.project([9.0, -1.0, 0.3]), c)
        assert np.array_equal(inside.worst([9.0, -1.0, 0.3]), c)
        for ascent in ASCENTS:
            assert np.array_equal(inside.step(c, [9.0, 1.0, 0.3], step_size=0.5, ascent=ascent), c)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_losses_share_in_proportion_to_the_centre(kind: str) -> None:
    c = np.array([0.4, 0.3, 0.2, 0.1])
    inside = MixtureSet(kind, 0.05, c)  # type: ignore[arg-type]
    assert np.array_equal(inside.worst([2.5] * 4), c)
    z = inside.worst([1.0, 1.0, 0.0, 0.0])
    assert z[0] / z[1] == pytest.approx(4 / 3)
    assert z[2] == pytest.approx(2 * z[3])
    assert z[0] > 0.4


def test_cvar_is_the_mean_over_the_worst_part() -> None:
    """At ρ = 1 the worst mixture is the worst half of ten equal clients, each at twice its weight."""
    losses = np.arange(10.0)
    z = MixtureSet("cvar", 1.0, robust_weights.uniform_center(10)).worst(losses)
    np.testing.assert_allclose(z, np.repeat([0.0, 0.2], 5), atol=1e-15)
    assert z @ losses == pytest.approx(losses[5:].mean())


def test_kl_worst_mixture_is_the_tilted_centre() -> None:
    c, losses = np.array([0.5, 0.3, 0.2]), np.array([0.2, 1.0, 0.7])
    z = MixtureSet("kl", 0.05, c).worst(losses)
    slopes = np.log(z / c)
    assert np.ptp(np.diff(slopes) / np.diff(losses)) < 1e-9


def test_the_floor_and_the_ceiling_of_the_public_functions() -> None:
    z = robust_weights.project_chi2_ball([1.0, 0.0, 0.0], 1e9, minimum=0.3)
    np.testing.assert_allclose(z, [0.8, 0.1, 0.1])
    z = robust_weights.project_chi2_ball([1.0, 0.0, 0.0], 1e9, maximum=1.5)
    np.testing.assert_allclose(z, [0.5, 0.25, 0.25])
    p = robust_weights.update_weights([0.5, 0.5], [1.0, 0.0], 0.2, 1e9, ascent="projected")
    np.testing.assert_allclose(p, [0.6, 0.4])
    p = robust_weights.update_weights([0.5, 0.5], [1.0, 0.0], 0.2, 0.02, ascent="closed_form", minimum=0.9)
    np.testing.assert_allclose(p, [0.55, 0.45])


# ---- the steps
def test_steps_of_any_size_stay_in_the_set() -> None:
    c = np.array([0.4, 0.3, 0.2, 0.1])
    for ascent in ASCENTS:
        inside = MixtureSet("chi2", 0.3, c, 0.1)
        for step_size in (0.0, 1e-300, 1e10, 1e300, np.inf):
            for losses in ([3.0, 1.0, 2.0, 2.5], [1e30, 1.0, 2.0, 2.5], [1e-30, 0.0, 0.0, 0.0], [1.0] * 4):
                z = inside.step(c, losses, step_size=step_size, ascent=ascent)  # type: ignore[arg-type]
                assert infeasible(z, inside) <= 1e-9
        far = inside.step(c, [3.0, 1.0, 2.0, 2.5], step_size=np.inf, ascent=ascent)  # type: ignore[arg-type]
        if ascent != "exponentiated":  # its limit is one client, whose projection is another point
            np.testing.assert_allclose(far, inside.worst([3.0, 1.0, 2.0, 2.5]), atol=1e-12)
    inside = MixtureSet("chi2", 0.3, c)
    np.testing.assert_allclose(
        inside.step(c, [3.0, 1.0, 2.0, 2.5], step_size=1e9, ascent="projected"),
        inside.worst([3.0, 1, 2, 2.5]),
        atol=1e-6,
    )
    one_kept = inside.step(
        c, [3.0, 1.0, np.nan, 2.5], step_size=np.inf, ascent="exponentiated", kept=[NAN, NAN, 0.2, NAN]
    )
    assert infeasible(one_kept, inside) <= 1e-9
    # nothing to multiply: the free clients have weight 0, and keep what the set allows
    left = inside.step([0.0, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 2.0], step_size=0.5, ascent="exponentiated",
                       kept=[NAN, 0.45, 0.25, NAN])  # fmt: skip
    assert infeasible(left, inside) <= 1e-9


def histories(seed: int, count: int, rounds: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n = int(rng.integers(2, 65))
        inside = random_set(rng, n, smallest_radius=1e-6)
        ascent, step_size = str(rng.choice(ASCENTS)), float(10 ** rng.uniform(-2, 1))
        p, hard = inside.center.copy(), rng.normal(4, 1, n)
        for _ in range(rounds):
            losses = np.abs(hard + rng.normal(0, 0.3, n))
            before, p = p, inside.step(p, losses, step_size=step_size, ascent=ascent)  # type: ignore[arg-type]
            if ascent == "closed_form":
                residual = kkt_residual(p, relative(losses), 0.0, inside)
            else:
                q = before * np.exp(step_size * (losses - losses.max()))
                q /= q.sum()
                if ascent != "exponentiated":
                    q = (before if ascent == "projected" else inside.center) + step_size * losses
                residual = kkt_residual(p, q, 1.0, inside)
            assert residual <= 1e-9, (inside, ascent, step_size, losses)


def test_properties_over_random_histories() -> None:
    histories(seed=0, count=1000, rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.exhaustive) for part in range(1, 10))])
def test_properties_over_a_hundred_thousand_random_histories(part: int) -> None:
    histories(seed=100 + part, count=10_000, rounds=2)


def shares(kind: str, radius: float, ascent: str, step_size: float, minimum: float = 0.0) -> list[float]:
    """Share of the robust gain after 25 rounds at frozen losses between 0 and 1, N from 2 to 64, three centres."""
    rng, found = np.random.default_rng(0), []
    for n in (2, 3, 10, 64):
        for c in centers(n, rng):
            inside = MixtureSet(kind, radius, c, minimum)  # type: ignore[arg-type]
            losses = rng.random(n)
            losses = (losses - losses.min()) / np.ptp(losses)
            p = c.copy()
            for _ in range(25):
                p = inside.step(p, losses, step_size=step_size, ascent=ascent)  # type: ignore[arg-type]
            gain = robust_weights.robust_gain(p, losses, inside)
            assert gain is not None
            assert gain["share"] is not None
            found.append(gain["share"])
    return found


@pytest.mark.parametrize(
    ("kind", "radius"), [("chi2", 1.0), ("chi2", 0.1), pytest.param("kl", 0.5, marks=pytest.mark.slow)]
)
def test_frozen_losses_give_the_balls_whole_gain(kind: str, radius: float) -> None:
    """At a spread of the losses of 1 and η = 0.5."""
    for minimum in (0.0, 0.1):
        assert min(shares(kind, radius, "projected", 0.5, minimum)) >= 0.99
    assert min(shares(kind, radius, "closed_form", 0.5)) >= 0.99
    assert min(shares(kind, radius, "exponentiated", 0.5)) < 0.95  # why it is not the default


@pytest.mark.parametrize(("kind", "radius"), [("cvar", 1.0), ("simplex", 0.0)])
def test_frozen_losses_in_sets_with_corners(kind: str, radius: float) -> None:
    """Near ties decide between corners, which takes 1/(η × their difference) rounds: η × spread of 0.5 is too little."""
    assert min(shares(kind, radius, "projected", 0.5)) >= 0.9
    assert min(shares(kind, radius, "projected", 4.0)) >= 0.99
    assert min(shares(kind, radius, "closed_form", 0.5)) >= 0.99


def rounds_until_above_centre(inside: MixtureSet, ascent: str, step_size: float = 0.5, easy_rounds: int = 30) -> int:
    """How long the client of the largest centre, after having been the easiest, takes to get above it when it is the worst."""
    n, client = inside.center.size, int(np.argmax(inside.center))
    others = np.linspace(0.4, 0.6, n)
    p = inside.center.copy()
    for t in range(easy_rounds + 100):
        others[client] = 0.0 if t < easy_rounds else 1.0
        p = inside.step(p, others, step_size=step_size, ascent=ascent)  # type: ignore[arg-type]
        if t >= easy_rounds and p[client] > inside.center[client]:
            return t - easy_rounds + 1
    return 100


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "kl" else k for k in KINDS])
def test_a_client_that_becomes_the_worst_is_heard_within_ten_rounds(kind: str) -> None:
    rng = np.random.default_rng(2)
    for n in (2, 3, 20, 64):
        for c in centers(n, rng):
            free, floor = MixtureSet(kind, 1.0, c), MixtureSet(kind, 1.0, c, 0.1)  # type: ignore[arg-type]
            for inside in (free, floor):
                assert rounds_until_above_centre(inside, "projected") <= 10
                assert rounds_until_above_centre(inside, "closed_form") == 1
            if np.ptp(c) == 0:  # from ε c it takes log(1/ε) and a bit, over η × the difference of the losses (here 0.4)
                assert rounds_until_above_centre(floor, "exponentiated", step_size=1.0) <= 10
    # without a floor the exponentiated step stays deaf to a client for about as long as it was easy
    for n in (2,) if kind == "cvar" else (2, 3):  # of three, CVaR at a half leaves the easiest some weight
        inside = MixtureSet(kind, 1.0, robust_weights.uniform_center(n))  # type: ignore[arg-type]
        assert rounds_until_above_centre(inside, "exponentiated", step_size=1.0) > 10


def test_zero_absorbs_only_in_the_exponentiated_step() -> None:
    inside = MixtureSet("chi2", 1.0, robust_weights.uniform_center(3))
    zero, losses = np.array([0.0, 0.5, 0.5]), [9.0, 1.0, 1.0]
    assert inside.step(zero, losses, step_size=0.5, ascent="exponentiated")[0] == 0
    assert inside.step(zero, losses, step_size=0.5, ascent="projected")[0] > 1 / 3
    floor = dataclasses.replace(inside, minimum=0.05)
    assert floor.step(zero, losses, step_size=0.5, ascent="exponentiated")[0] == pytest.approx(0.05 / 3)


def largest_weight(ascent: str, step_size: float, smoothing: float, radius: float = 1.0) -> float:
    """Median over 60 histories of the largest p after 25 rounds of five equally hard clients with noise of SD 0.1."""
    rng, ends = np.random.default_rng(0), []
    inside = MixtureSet("chi2", radius, robust_weights.uniform_center(5))
    for _ in range(60):
        p, smooth = inside.center.copy(), None
        for _ in range(25):
            losses = 4 + 0.1 * rng.normal(size=5)
            smooth = losses if smooth is None else smoothing * smooth + (1 - smoothing) * losses
            p = inside.step(p, smooth, step_size=step_size, ascent=ascent)  # type: ignore[arg-type]
        ends.append(p.max())
    return float(np.median(ends))


def test_noise_of_equally_hard_clients() -> None:
    """Accumulating steps walk at random, by η √rounds SD; smoothing only prolongs each piece of noise."""
    assert largest_weight("projected", 0.1, 0.0) <= 0.3
    assert largest_weight("projected", 0.1, 0.5) <= 0.3
    assert largest_weight("projected", 0.1, 0.8) <= 0.3
    assert largest_weight("exponentiated", 0.5, 0.0) <= 0.3
    assert largest_weight("projected", 0.5, 0.5) > 0.35
    assert largest_weight("closed_form", 0.5, 0.8) > 0.65  # it takes the ball's edge for any difference


# ---- the gain
def test_robust_gain_by_hand() -> None:
    inside = MixtureSet("chi2", 0.02, np.array([0.5, 0.5]))  # p in [0.4, 0.6]
    gain = robust_weights.robust_gain([0.55, 0.45], [3.0, 1.0], inside)
    assert gain == pytest.approx({"mixture": 2.1, "mean": 2.0, "best": 2.2, "share": 0.5})
    level = robust_weights.robust_gain([0.55, 0.45], [2.0, 2.0], inside)
    assert level is not None
    assert level["share"] is None
    pinned = robust_weights.robust_gain([0.5, 0.5], [3.0, 1.0], MixtureSet("chi2", 0.0, np.array([0.5, 0.5])))
    assert pinned == {"mixture": 2.0, "mean": 2.0, "best": 2.0, "share": None}


def test_robust_gain_leaves_out_clients_without_a_loss() -> None:
    inside = MixtureSet("simplex", 0.0, np.array([0.25, 0.25, 0.5]))
    gain = robust_weights.robust_gain([0.6, 0.2, 0.2], [3.0, 1.0, np.nan], inside)
    assert gain == pytest.approx({"mixture": 2.5, "mean": 2.0, "best": 3.0, "share": 0.5})
    gain = robust_weights.robust_gain([0.0, 0.0, 1.0], [3.0, 1.0, np.nan], inside)
    assert gain == pytest.approx({"mixture": 2.0, "mean": 2.0, "best": 3.0, "share": 0.0})
    assert robust_weights.robust_gain([0.0, 0.0, 1.0], [np.nan] * 3, inside) is None


# ---- errors
C4 = robust_weights.uniform_center(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MixtureSet("tv", 1.0, C4), "kind must be"),  # type: ignore[arg-type]
        (lambda: MixtureSet("chi2", -1.0, C4), "radius must be ≥ 0"),
        (lambda: MixtureSet("chi2", 1.0, C4, 1.5), r"minimum must lie in \[0, 1\]"),
        (lambda: MixtureSet("chi2", 1.0, C4, NAN), r"minimum must lie in \[0, 1\]"),
        (lambda: MixtureSet("chi2", 1.0, C4, 0.0, 0.5), "maximum must be ≥ 1"),
        (lambda: MixtureSet("chi2", 1.0, np.array([1.0, 0.0])), "center must be > 0"),
        (lambda: MixtureSet("chi2", 1.0, C4).project([1.0, 2.0]), "center has 4 entries for 2"),
        (lambda: MixtureSet("chi2", 1.0, C4).divergence([1.0, 2.0]), "p has 2 weights and center 4"),
        (lambda: MixtureSet("chi2", 1.0, C4).worst([1.0, NAN, 1, 1]), r"losses\[1\] is nan"),
        (lambda: MixtureSet("chi2", 1.0, C4).worst([1.0]), "losses has shape"),
        (lambda: MixtureSet("chi2", 1.0, C4).project(C4, kept=[NAN, 0.2]), "kept has shape"),
        (lambda: MixtureSet("chi2", 1.0, C4).project(C4, kept=[NAN, NAN, 0.7, 0.6]), "kept sums to 1.2"),
        (lambda: MixtureSet("chi2", 1.0, C4).project(C4, kept=[0.2, 0.2, 0.2, 0.2]), "kept sums to 0.8"),
        (lambda: MixtureSet("chi2", 1.0, C4).project(C4, kept=[NAN, NAN, -0.1, 0.6]), "kept has weights outside"),
        (lambda: MixtureSet("chi2", 1.0, C4, 0.5).project(C4, kept=[NAN, NAN, 0.0, 0.6]), "kept has weights outside"),
        (lambda: MixtureSet("chi2", 9.0, C4, 0.5).project(C4, kept=[NAN, NAN, 0.45, 0.45]), "kept leaves 0.1"),
        (lambda: MixtureSet("chi2", 0.01, C4).project(C4, kept=[NAN, NAN, NAN, 0.9]), "kept alone is at divergence"),
        (lambda: MixtureSet("chi2", 1.0, C4).step(C4, C4, step_size=-1.0, ascent="projected"), "step_size must be ≥ 0"),
        (lambda: MixtureSet("chi2", 1.0, C4).step(C4, C4, step_size=NAN, ascent="projected"), "step_size must be ≥ 0"),
        (lambda: MixtureSet("chi2", 1.0, C4).step(C4, C4, step_size=1.0, ascent="up"), "ascent must be"),  # type: ignore[arg-type]
        (lambda: robust_weights.robust_gain(C4, [1.0], MixtureSet("chi2", 1.0, C4)), "p has 4 weights and losses"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
