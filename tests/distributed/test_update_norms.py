"""An update that is far larger than the others is not averaged, and is named (aggregate.max_norm_ratio)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import Fault, metrics_of, on_ranks, same_bits, tree, watched, weights_of, zero

from feddra_ds.federation.aggregation.norms import UpdateNorms

SETTINGS: dict[str, Any] = {"deepspeed": zero(2), "schedule__rounds": 3, "evaluation__every": 0}


def reason_of(line: dict[str, Any]) -> str:
    (excluded,) = line["excluded_clients"]
    assert excluded["id"] == "south"
    return excluded["reason"]


@pytest.mark.slow
def test_it_is_left_out_by_what_the_round_before_had(dataset: Path, tmp_path: Path) -> None:
    """On two slots, after a resume too: as if its weights had not been finite."""
    for kind in ("far", "weights"):
        fault = [Fault("south", kind, round=number) for number in (1, 2)]
        for rounds in (2, 3):  # the last one in a run that is resumed
            config = tree(dataset, tmp_path / kind, **SETTINGS | {"schedule__rounds": rounds})
            on_ranks(watched, 2, config, fault)
    first, *others = metrics_of(tmp_path / "far")
    assert first["excluded_clients"] == []
    usual = first["update_norms"]
    for line in others:
        assert "is over" in reason_of(line)
        assert "aggregate.max_norm_ratio" in reason_of(line)
        assert line["update_norms"]["south"] > 100 * max(usual.values())
        assert line["update_norms"]["north"] < 3 * usual["north"]
    for number in (1, 2):
        assert same_bits(weights_of(tmp_path / "far", number), weights_of(tmp_path / "weights", number))


def test_the_first_average_that_holds_one_is_not_used(dataset: Path, tmp_path: Path) -> None:
    faults = [Fault("south", "far", round=number) for number in (0, 1)]
    config = tree(dataset, tmp_path / "run", **SETTINGS | {"schedule__rounds": 2, "schedule__stage1_steps": 0})
    (seen, *_) = on_ranks(watched, 2, config, faults)
    first, second = metrics_of(tmp_path / "run")
    assert "is over" in reason_of(first)
    assert "is over" in reason_of(second)
    # nobody's update of the first round came into the second
    starts = [stage["before"] for stage in seen["stages"]]
    for (name, _, now), (_, _, before) in zip(starts[-1], starts[0], strict=True):
        assert (now == before).all(), name
    losses = [line["client_losses"] for line in (first, second)]
    assert losses[0] != losses[1]


def test_norms_are_compared_with_the_median_of_those_that_moved() -> None:
    norms = UpdateNorms(10.0)
    assert norms.limit("stage2") is None
    assert norms.far_off("stage2", {0: 1.0, 1: 1000.0}) == {}, "of two nobody knows which is wrong"
    assert list(norms.far_off("stage2", {0: 1.0, 1: 1000.0, 2: 2.0})) == [1]
    assert norms.far_off("stage2", {0: 1.0, 1: 9.0, 2: 2.0}) == {}
    assert norms.far_off("stage2", {0: 0.0, 1: 0.0, 2: 2.0}) == {}, "where most stand still"
    norms.learn("stage2", {0: 1.0, 2: 3.0, 3: 0.0})
    assert norms.limit("stage2") == pytest.approx(20.0)
    assert norms.limit("stage1") is None
    assert norms.far_off("stage2", {0: 1.0, 1: 1000.0, 2: 2.0}) == {}, "the slots knew the limit"
    norms.learn("stage2", {0: 0.0})
    assert norms.limit("stage2") == pytest.approx(20.0)
    assert UpdateNorms(None).far_off("stage2", dict(enumerate([1.0, math.inf, 2.0]))) == {}
