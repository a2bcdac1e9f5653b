"""What does not go together with a rule of aggregation is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from feddra_ds import strategies
from feddra_ds.config.load import from_dict
from feddra_ds.run.checks import _rule_problems

LORA = {"type": "lora", "r": 2}


@pytest.mark.parametrize(
    ("aggregate", "strategy", "adapter", "num_clients", "words"),
    [
        ({"rule": "median"}, "feddra", None, 3, None),
        ({"rule": "krum"}, "fedavgm", None, 5, None),
        ({"rule": "trimmed_mean"}, "fedprox", LORA | {"aggregation": "alternate"}, 3, None),
        ({"rule": "median", "min_cosine": 0.0}, "moon", LORA, 3, None),
        ({"rule": "mean"}, "qffl", None, 1, None),
        ({"rule": "median"}, "feddra", None, 2, "aggregate.rule: needs 3 clients in a round, and this run gives 2; use mean"),
        ({"rule": "krum", "num_bad": 2}, "feddra", None, 6, "needs 7 clients in a round, 2 aggregate.num_bad + 3"),
        ({"min_cosine": 0.0}, "feddra", None, 2, "aggregate.min_cosine: needs 3 clients"),
        ({"rule": "median"}, "local", None, 5, "strategy.name=local averages no updates"),
        ({"rule": "median"}, "centralized", None, 1, "needs 3 clients"),
        ({"rule": "median"}, "qffl", None, 5, "strategy.name=qffl has counted elsewhere; use mean"),
        ({"min_cosine": 0.0}, "scaffold", None, 5, "strategy.name=scaffold has counted elsewhere; use null"),
        ({"rule": "krum"}, "drfa", None, 5, "strategy.name=drfa has counted elsewhere"),
        ({"rule": "krum"}, "feddra", LORA | {"aggregation": "stack"}, 5, "model.adapter.aggregation=stack"),
    ],
    ids=str,
)  # fmt: skip
def test_rules(aggregate: dict[str, Any], strategy: str, adapter: Any, num_clients: int, words: str | None) -> None:
    given = {
        "data": {"root": "x"},
        "aggregate": aggregate,
        "strategy": {"name": strategy},
        "model": {"adapter": adapter},
    }
    if strategy in ("qffl", "scaffold", "fedavgm"):
        given |= {"schedule": {"stage1_steps": 0}, "optimizer": {"name": "sgd", "lr": 0.1}}
    config = from_dict(given)
    problems = _rule_problems(config, strategies.build(config.strategy, config.dro), num_clients)
    if words is None:
        assert problems == []
    else:
        (line,) = problems
        assert words in line
