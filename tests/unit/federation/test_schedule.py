"""The round as data."""

from __future__ import annotations

import numpy as np
import pytest

from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import ScheduleConfig
from feddra_ds.federation.schedule import draws_of_round, learning_rate, stages_of_round, steps_per_round


def test_stages() -> None:
    config = from_dict({"data": {"root": "x"}, "optimizer": {"lr": 0.5}})
    first, second = stages_of_round(config, 3)
    assert (first.name, first.num_steps, first.parts) == ("stage1", 20, ("aligner",))
    assert first.learning_rates == {"aligner": 0.5, "backbone": 0.0}
    assert (second.name, second.num_steps, second.parts) == ("stage2", 50, ("aligner", "backbone"))
    assert second.learning_rates == {"aligner": 0.5, "backbone": 0.5}
    assert steps_per_round(config) == 70
    config.schedule.stage1_steps = 0
    assert [stage.name for stage in stages_of_round(config, 0)] == ["stage2"]


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466]),
    ],
)
def test_learning_rate_over_rounds(decay: str, expected: list[float]) -> None:
    schedule = ScheduleConfig(rounds=6, warmup_rounds=2, decay=decay, min_lr_fraction=0.1)
    assert [learning_rate(1.0, schedule, r) for r in range(6)] == pytest.approx(expected)


def test_clients_of_a_round_are_drawn_by_seed_and_round_alone_and_each_as_often() -> None:
    config = from_dict({"data": {"root": "x"}, "clients": {"per_round": 3}})
    p = np.full(10, 0.1)
    drawn = np.array([draws_of_round(config, number, p) for number in range(3000)])
    np.testing.assert_array_equal(drawn[:50], [draws_of_round(config, number, p) for number in range(50)])
    assert set(drawn.flatten()) == {0, 1}
    assert set(drawn.sum(1)) == {3}
    # binomial of mean 900, standard deviation 25: five of them
    assert np.abs(drawn.sum(0) - 900).max() < 125
    other = from_dict({"data": {"root": "x"}, "clients": {"per_round": 3}, "run": {"seed": 1}})
    assert not np.array_equal(drawn[:50], [draws_of_round(other, number, p) for number in range(50)])
    assert draws_of_round(from_dict({"data": {"root": "x"}}), 5, np.full(4, 0.25)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("per_round", [None, 2])
def test_draws_by_weight_are_independent_and_follow_p(per_round: int | None) -> None:
    config = from_dict({"data": {"root": "x"}, "clients": {"per_round": per_round}})
    p, num_draws = np.array([0.0, 0.5, 0.2, 0.3, 0.0]), per_round or 5
    drawn = np.array([draws_of_round(config, number, p, by_weight=True) for number in range(4000)])
    assert set(drawn.sum(1)) == {num_draws}
    expected, spread = 4000 * num_draws * p, np.sqrt(4000 * num_draws * p * (1 - p))
    assert np.all(np.abs(drawn.sum(0) - expected) <= 5 * spread)  # 0 stays 0
    # client 1 is drawn binomially in each round: without replacement it would come once at most
    often = np.mean(drawn[:, 1] == num_draws)
    assert often == pytest.approx(0.5**num_draws, abs=5 * 0.5 / np.sqrt(4000))


def test_a_snapshot_is_after_any_step_of_the_round_alike() -> None:
    config = from_dict({"data": {"root": "x"}, "schedule": {"stage1_steps": 2, "stage2_steps": 3}})
    places = []
    for number in range(5000):
        stages = stages_of_round(config, number, takes_snapshot=True)
        ((place,)) = [(stage.name, stage.snapshot) for stage in stages if stage.snapshot is not None]
        places.append(place)
    counts = {place: places.count(place) for place in set(places)}
    assert set(counts) == {("stage1", 1), ("stage1", 2), ("stage2", 1), ("stage2", 2), ("stage2", 3)}
    assert max(abs(count - 1000) for count in counts.values()) < 142  # five standard deviations of 28.3
    assert all(stage.snapshot is None for stage in stages_of_round(config, 0))
