"""Gradient clipping in runs of two stages: what does not train in a stage takes no part in its norm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import on_each, run_all, same_bits, tree, weights_of, zero

from feddra_ds.checkpoint.format import folder_of


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_clips_as_one_that_goes_on(dataset: Path, tmp_path: Path, stage: int) -> None:
    """ZeRO 3 keeps a gradient until the next one of its parameter: stage 1 must not clip by those of the last stage 2."""
    one, two = tmp_path / "one", tmp_path / "two"
    fragment = zero(stage) | {"gradient_clipping": 0.1}
    more = {"deepspeed": fragment, "clients__ids": ["north"], "evaluation__every": 0, "schedule__stage2_steps": 1}
    on_each(run_all, [(tree(dataset, one, **more),)])
    shutil.copytree(one, two)
    shutil.rmtree(folder_of(two, 1))
    on_each(run_all, [(tree(dataset, two, **more),)])
    assert same_bits(weights_of(one, 1), weights_of(two, 1))
