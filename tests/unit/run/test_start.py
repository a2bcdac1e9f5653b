"""What a run says before its first round."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import make_config

from feddra_ds.distributed.plan import plan
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.run.build import _say_what_starts, _say_where_p_moves
from feddra_ds.strategies.mixture_set import MixtureSet, SetKind


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING, **sections: Any) -> list[str]:
    config = make_config(Path("run"), Path("data"), **sections)
    config.model.head.output_norm = "batchnorm"  # without it, random encoders are warned of
    model = model_of(config, tokenizer_of(config))
    with caplog.at_level(logging.INFO, logger="feddra_ds"):
        _say_what_starts(config, plan(1, 3), torch.device("cpu"), model)
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_the_start_says_how_many_pairs_a_round_trains_on(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(caplog, logging.INFO)
    assert line.endswith("3 clients, at most 3 per slot on cpu, feddra, 36 pairs a round")  # 3 clients × 3 steps × 4


def test_weights_that_act_twice_are_said_with_what_they_optimise(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(caplog, dro={"apply": "both"})
    assert "Σ N p² L" in line
    assert "dro.apply=aggregate" in line
    assert "\n" not in line


def test_weights_in_the_loss_alone_are_warned_of_under_adam(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(caplog, dro={"apply": "loss"})
    assert "almost a no-op" in line


@pytest.mark.parametrize("sections", [{}, {"dro": {"apply": "loss"}, "optimizer": {"name": "sgd"}}])
def test_nothing_is_warned_of_otherwise(caplog: pytest.LogCaptureFixture, sections: dict[str, Any]) -> None:
    assert said(caplog, **sections) == []


@pytest.mark.parametrize(
    ("kind", "radius", "maximum", "is_warned_of"),
    [("chi2", 0.5, None, False), ("chi2", 1.0, None, True), ("chi2", 1.0, 2.0, False), ("simplex", 0.0, None, False)],
)
def test_a_radius_that_forbids_nothing_is_warned_of(
    caplog: pytest.LogCaptureFixture, kind: SetKind, radius: float, maximum: float | None, is_warned_of: bool
) -> None:
    """Of three equal clients one has the whole average at a χ² radius of 1; who asks for the simplex wants that."""
    inside = MixtureSet(kind, radius, np.full(3, 1 / 3), 0.0, maximum)
    with caplog.at_level(logging.INFO, logger="feddra_ds"):
        _say_where_p_moves(inside, ["north", "south", "west"])
    said, *warned = caplog.records
    assert said.getMessage().startswith("p can move, by client: north 0.00 to ")
    assert [record.getMessage().split(":")[0] for record in warned] == ["dro.radius=1 forbids nothing"] * is_warned_of
