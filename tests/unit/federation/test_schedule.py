"""The round as data."""

from __future__ import annotations

import pytest

from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import ScheduleConfig
from feddra_ds.federation.schedule import clients_of_round, learning_rate, stages_of_round, steps_per_round


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


def test_one_factor_of_the_adapters_rests_in_turn() -> None:
    resting = {}
    for rule in ("alternate", "residual"):
        config = from_dict({"data": {"root": "x"}, "model": {"adapter": {"type": "lora", "aggregation": rule}}})
        rounds = [stages_of_round(config, number) for number in range(4)]
        assert all(first.resting_factor is None for first, _ in rounds), "stage 1 trains no adapter"
        resting[rule] = [second.resting_factor for _, second in rounds]
    assert resting == {"alternate": ["a", "b", "a", "b"], "residual": [None] * 4}


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
    drawn = [clients_of_round(config, number, 10) for number in range(3000)]
    assert drawn[:50] == [clients_of_round(config, number, 10) for number in range(50)]
    assert all(len(set(here)) == 3 and here == sorted(here) for here in drawn)
    often = [sum(client in here for here in drawn) for client in range(10)]
    # binomial of mean 900, standard deviation 25: five of them
    assert max(abs(count - 900) for count in often) < 125
    other = from_dict({"data": {"root": "x"}, "clients": {"per_round": 3}, "run": {"seed": 1}})
    assert drawn[:50] != [clients_of_round(other, number, 10) for number in range(50)]
    assert clients_of_round(from_dict({"data": {"root": "x"}}), 5, 4) == [0, 1, 2, 3]
