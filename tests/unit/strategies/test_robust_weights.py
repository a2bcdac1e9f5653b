"""The weights against their definition: KKT conditions, closed forms, extremes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feddra_ds.strategies import robust_weights


def kkt_residual(z: np.ndarray, q: np.ndarray, c: np.ndarray, radius: float) -> float:
    """How far z is from argmin ½‖z − q‖² over P(ρ): feasibility, and the best multipliers' stationarity residual.

    Stationarity on the support: q_i − z_i = μ (z_i − c_i)/c_i + ν with μ ≥ 0 (0 inside the ball); off it, ≤.
    """
    divergence = 0.5 * np.sum((z - c) ** 2 / c)
    infeasible = max(abs(z.sum() - 1), float(-z.min()), divergence - radius, 0.0)
    support = z > 1e-12
    slope, gap = (z - c) / c, q - z
    if divergence < radius * (1 - 1e-9) - 1e-15:
        mu = 0.0
        nu = gap[support].mean()
    else:
        design = np.stack([slope[support], np.ones(support.sum())], axis=1)
        (mu, nu), *_ = np.linalg.lstsq(design, gap[support], rcond=None)
    on = np.abs(gap[support] - mu * slope[support] - nu).max()
    off = max(0.0, float((gap - mu * slope - nu)[~support].max())) if (~support).any() else 0.0
    # a tiny ball makes the multiplier huge (of order 1/√ρ); the residual is measured against it
    return max(infeasible, (on + off) / (1 + abs(mu)), max(0.0, -mu) if support.sum() > 2 else 0.0)


@given(
    q=hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(-3, 3)),
    seed=st.integers(0, 2**31),
    radius=st.floats(1e-4, 20),
)
@settings(max_examples=300, deadline=None)
def test_projection_meets_kkt_for_any_center(q: np.ndarray, seed: int, radius: float) -> None:
    c = np.random.default_rng(seed).dirichlet(np.full(q.size, 2.0)) * 0.95 + 0.05 / q.size
    c /= c.sum()
    z = robust_weights.project_chi2_ball(q, radius, c)
    assert z.dtype == np.float64
    assert kkt_residual(z, q, c, radius) < 1e-7


@given(q=hnp.arrays(np.float64, st.integers(2, 9), elements=st.floats(0.001, 1)), radius=st.floats(1e-3, 10))
@settings(max_examples=200, deadline=None)
def test_uniform_center_is_radial(q: np.ndarray, radius: float) -> None:
    q = q / q.sum()
    n, c = q.size, np.full(q.size, 1 / q.size)
    distance = np.linalg.norm(q - c)
    expected = c + (q - c) * min(1.0, np.sqrt(2 * radius / n) / max(distance, 1e-300))
    np.testing.assert_allclose(robust_weights.project_chi2_ball(q, radius), expected, atol=1e-12)
    # and the general solver, with a centre uniform but for its last bit, agrees with the closed form
    nearly = c.copy()
    nearly[0] += 1e-15
    np.testing.assert_allclose(robust_weights.project_chi2_ball(q, radius, nearly), expected, atol=1e-7)


def test_limits_of_the_radius() -> None:
    q, c = np.array([0.7, 0.2, 0.1, 0.0]), np.array([0.4, 0.3, 0.2, 0.1])
    assert np.array_equal(robust_weights.project_chi2_ball(q, 0.0, c), c)
    np.testing.assert_array_equal(robust_weights.project_chi2_ball(q, 1e9, c), robust_weights.project_simplex(q))
    assert robust_weights.full_simplex_radius(np.full(5, 0.2)) == pytest.approx(2.0)
    vertex = np.array([0.0, 0.0, 0.0, 1.0])
    assert robust_weights.chi2_divergence(vertex, c) == pytest.approx(robust_weights.full_simplex_radius(c))


@pytest.mark.parametrize("scale", [1e6, 1e20])
def test_far_away_q(scale: float) -> None:
    z = robust_weights.project_chi2_ball(np.array([3.0, 1.0, -2.0]) * scale, 0.3, np.array([0.5, 0.3, 0.2]))
    assert np.isfinite(z).all()
    assert z.sum() == pytest.approx(1)
    assert robust_weights.chi2_divergence(z, [0.5, 0.3, 0.2]) <= 0.3 + 1e-9


def test_ascent_by_hand() -> None:
    p = robust_weights.update_weights([0.5, 0.5], [np.log(3), 0.0], step_size=1.0, radius=1e9)
    np.testing.assert_allclose(p, [0.75, 0.25])
    # the ball around ½: N/2 ‖p − c‖² ≤ ρ, so each weight may leave ½ by √(ρ/2)
    p = robust_weights.update_weights([0.5, 0.5], [np.log(3), 0.0], step_size=1.0, radius=0.02)
    np.testing.assert_allclose(p, [0.6, 0.4])


def test_losses_up_to_a_million_stay_finite() -> None:
    p = robust_weights.update_weights(np.full(4, 0.25), [1e6, 1e6 - 1, 0.0, -1e6], step_size=0.5, radius=1.0)
    assert np.isfinite(p).all()
    assert p.sum() == pytest.approx(1)
    assert p[0] > p[1] > p[2]


def test_weights_ignore_a_common_shift_and_keep_zeros() -> None:
    p = np.array([0.5, 0.5, 0.0])
    a = robust_weights.update_weights(p, [1.0, 2.0, 9.0], 0.5, 1e9)
    b = robust_weights.update_weights(p, [101.0, 102.0, 109.0], 0.5, 1e9)
    np.testing.assert_allclose(a, b, atol=1e-13)
    assert a[2] == 0


def test_radius_zero_pins_the_center_to_the_bit() -> None:
    c = robust_weights.samples_center([3, 1, 7])
    assert np.array_equal(robust_weights.update_weights(c, [5.0, 1.0, 2.0], 0.5, 0.0, c), c)
    assert np.array_equal(
        robust_weights.update_weights(np.full(3, 1 / 3), [5.0, 1.0, 2.0], 0.5, 0.0), np.full(3, 1 / 3)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust_weights.project_chi2_ball([0.5, np.nan], 1.0), "q must be finite"),
        (lambda: robust_weights.project_chi2_ball([0.5, 0.5], -1.0), "radius must be ≥ 0"),
        (lambda: robust_weights.project_chi2_ball([0.5, 0.5], float("nan")), "radius must be ≥ 0"),
        (lambda: robust_weights.project_chi2_ball([0.5, 0.5], 1.0, [1.0, 0.0]), "center must be > 0"),
        (lambda: robust_weights.project_chi2_ball([0.5, 0.5], 1.0, [0.5, 0.3, 0.2]), "center has 3 entries for 2"),
        (lambda: robust_weights.project_chi2_ball([[0.5]], 1.0), "q must be a vector"),
        (lambda: robust_weights.update_weights([0.5, 0.5], [1.0, np.inf], 0.5, 1.0), r"losses\[1\] is inf"),
        (lambda: robust_weights.update_weights([0.5, 0.5], [1.0], 0.5, 1.0), "p has 2 weights"),
        (lambda: robust_weights.update_weights([1.5, -0.5], [1.0, 1.0], 0.5, 1.0), "p must be ≥ 0"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
