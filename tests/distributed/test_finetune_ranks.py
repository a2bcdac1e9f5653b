"""Fine-tuning on two processes gives what one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import add_model, make_config, make_data, make_line, make_run
from spawn import run_ranks

from feddra_ds.evaluation.finetune import finetune
from feddra_ds.evaluation.transfer import Table

pytestmark = pytest.mark.slow


def table_of(run: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The result, and the logits of each classifier on the measured pairs."""
    logits: list[np.ndarray] = []
    scored = Table.scored

    def remember(self: Table, values: np.ndarray) -> Any:
        logits.append(values)
        return scored(self, values)

    Table.scored = remember  # type: ignore[method-assign]
    try:
        # 18 labels at a half make batches of 8, 3 at the least share batches of 2
        found = finetune(run, fractions=[0.01, 0.5], epochs=2, repeats=1, batch_size=8, device="cpu", lr=1e-3)
    finally:
        Table.scored = scored  # type: ignore[method-assign]
    return found, logits


def on_a_rank(rank: int, world_size: int, run: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    return table_of(run)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", make_data(tmp_path / "data"))
    add_model(tmp_path / "run" / "model", config)
    run = make_run(tmp_path / "run", config, [make_line(0)])
    one, expected = table_of(run)
    two = run_ranks(on_a_rank, 2, run)
    assert two[0][0] == two[1][0], "all processes have the same"
    found, logits = two[0]
    assert (one["processes"], found["processes"]) == (1, 2)
    assert len(logits) == len(expected) == 4
    for a, b in zip(logits, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    assert not np.allclose(expected[2], expected[3], atol=2e-2), "full fine-tuning has moved the encoder"
    for mode, shares in one["transfer"].items():
        for share, about in shares.items():
            assert found["transfer"][mode][share]["steps"] == about["steps"]
            assert found["transfer"][mode][share]["mean"]["auroc"]["values"] == about["mean"]["auroc"]["values"]
