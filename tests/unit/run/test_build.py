"""What a run says at its start."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_helpers import make_config

from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.model.weights.deferred import defer
from feddra_ds.run.build import sides_at_chance


@pytest.mark.parametrize(
    ("model", "sides"),
    [
        ({}, ["vision", "text"]),
        ({"text.pooling": "mean"}, ["vision"]),
        ({"vision.pooling": "mean", "text.pooling": "mean"}, []),
        ({"head.output_norm": "layernorm"}, ["vision", "text"]),
        ({"head.output_norm": "batchnorm"}, []),
    ],
)
def test_random_encoders_whose_first_token_is_pooled_start_at_chance(model: dict[str, str], sides: list[str]) -> None:
    config = make_config(Path("run"), Path("data"))
    tree = config.model_dump()
    for key, value in model.items():
        section, leaf = key.split(".")
        tree["model"][section][leaf] = value
    config = type(config).model_validate(tree)
    built, _ = defer(lambda: model_of(config, tokenizer_of(config)))
    assert sides_at_chance(config.model, built.config) == sides
