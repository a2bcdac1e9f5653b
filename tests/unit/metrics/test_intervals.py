"""Intervals over repetitions, against scipy and Holm's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from feddra_ds.metrics.intervals import bootstrap, holm, paired_bootstrap, t_interval

numbers = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(numbers)
def test_t_interval_is_scipys(values: list[float]) -> None:
    found = t_interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    if len(set(values)) == 1:
        assert found.low == found.high == found.mean
        return
    expected = stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)


def test_differences_are_a_paired_test() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(0.3, 1, 8), draw.normal(0, 1, 8)
    found = t_interval((a - b).tolist())
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert t_interval([2.0]).low is None
    assert t_interval([2.0]).p_value is None
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_equal_values_are_equal_in_floats_too() -> None:
    found = t_interval([0.1 + 0.2 - 0.3] * 3 + [0.0] * 3)  # 5.6e-17 is rounding, no spread
    assert found.p_value == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for raw, told in zip(p_values, adjusted, strict=True):
        assert raw <= told <= min(1.0, len(p_values) * raw) + 1e-12 or told == max(adjusted)
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_a_paired_interval_is_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 200).astype(float)
    second = np.where(np.arange(200) < 20, 0.0, first)  # the same but for a few pairs
    low, high = paired_bootstrap(first, second, range(200), draws=500, seed=0)
    assert low < (first - second).mean() < high
    apart = [bootstrap(x, range(200), draws=500, seed=0) for x in (first, second)]
    assert high - low < 0.6 * (apart[0][1] - apart[0][0]), (
        "pairs that both models treat alike say nothing against a difference"
    )
    low, high = paired_bootstrap(first, first, range(200), draws=50, seed=0)
    assert -0.03 < low < 0 < high == -low < 0.03, (
        "no difference in 200 pairs bounds it, and does not prove that there is none"
    )
