"""The weights p as a strategy moves them: the keys of the section dro, and losses that no client can be believed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from feddra_ds import strategies
from feddra_ds.config.load import from_dict
from feddra_ds.strategies import Strategy
from feddra_ds.strategies.robust_weights import believable, full_simplex_radius, update_weights

CHANCE = 2 * math.log(32)


def strategy(**dro: object) -> Strategy:
    config = from_dict({"data": {"root": "x"}, "dro": dro})
    return strategies.build(config.strategy, config.dro)


def test_only_losses_that_a_model_can_have_are_believed() -> None:
    told = [3.0, None, math.nan, math.inf, -math.inf, -1e-9, 1e30, CHANCE, 0.0]
    expected = [3.0, *[math.nan] * 5, CHANCE, CHANCE, 0.0]
    np.testing.assert_array_equal(believable(told, CHANCE), expected)


def test_the_default_step_is_the_release_s_within_narrower_bounds() -> None:
    center = np.full(4, 0.25)
    losses = np.array([3.0, 4.0, 5.0, 3.5])
    expected = update_weights(center, losses, 0.5, 1.0, center)
    unbounded = strategy(minimum_weight=0.0, maximum_weight=None)
    np.testing.assert_array_equal(unbounded.next_mixture(center, losses, center), expected)
    assert expected.max() > 1.5 * 0.25
    bounded = strategy().next_mixture(center, losses, center)
    assert bounded.max() == pytest.approx(1.5 * 0.25)
    assert np.argsort(bounded).tolist() == np.argsort(losses).tolist()


@pytest.mark.parametrize("ascent", ["projected", "closed_form", "exponentiated"])
def test_a_client_without_a_loss_keeps_its_weight_and_the_bounds_hold_for_all(ascent: str) -> None:
    own = strategy(ascent=ascent, minimum_weight=0.2, maximum_weight=2.0, radius=0.4)
    rng, center = np.random.default_rng(0), np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    inside, p = own.mixture_set(center), center
    for _ in range(50):
        losses = np.where(rng.random(5) < 0.3, math.nan, rng.uniform(0, CHANCE, 5))
        moved = own.next_mixture(p, losses, center)
        np.testing.assert_allclose(moved[np.isnan(losses)], p[np.isnan(losses)], atol=1e-12)
        assert moved.sum() == pytest.approx(1, abs=1e-12)
        assert inside.divergence(moved) <= 0.4 * (1 + 1e-9)
        assert np.all(moved >= 0.2 * center - 1e-12)
        assert np.all(moved <= 2 * center + 1e-12)
        p = moved


def test_a_radius_can_be_a_share_of_the_whole_simplex() -> None:
    for size in (3, 10):
        center = np.full(size, 1 / size)
        assert strategy(radius_share=0.5).mixture_set(center).radius == pytest.approx(0.5 * full_simplex_radius(center))
    whole = strategy(set="kl", radius_share=1.0, minimum_weight=0.0, maximum_weight=None)
    assert whole.mixture_set(center).reach()[1] == pytest.approx(np.ones(10))


def test_fixed_weights_stay() -> None:
    p = np.array([0.7, 0.3])
    own = strategy(fixed_weights=[0.7, 0.3], ascent="closed_form")
    np.testing.assert_array_equal(own.next_mixture(p, np.array([1.0, 5.0]), np.full(2, 0.5)), p)
