"""An objective on regions and words knows no layout: gathered, cached over micro-batches, anchored, at ZeRO 0 to 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import largest_difference, metrics_of, on_each, run_all, tree, weights_of, zero

LAYOUTS: list[tuple[int, int, dict[str, Any]]] = [
    (1, 0, {"data__micro_batch_size": 3}),
    (1, 3, {}),
    (2, 2, {}),
    (2, 3, {"objective__anchors": "resident"}),
]


@pytest.mark.slow
def test_tokens_know_no_layout(dataset: Path, tmp_path: Path) -> None:
    settings = {"objective__name": "token_objective:TokenMatch", "objective__learnable_temperature": True}
    folders = []
    for number, (ranks, stage, more) in enumerate([(1, 0, {}), *LAYOUTS]):
        out = tmp_path / str(number)
        config = tree(dataset, out, deepspeed=zero(stage), topology__ranks_per_slot=ranks, **settings, **more)
        on_each(run_all, [(config,)], world_size=ranks)
        folders.append(out)
    one, *others = folders
    assert np.ptp([line["mean_loss"] for line in metrics_of(one)]) > 1e-3, (
        "it hardly trains, so that agreeing says little"
    )
    for folder, layout in zip(others, LAYOUTS, strict=True):
        assert largest_difference(weights_of(one, 1), weights_of(folder, 1)) <= 2e-5, layout
        for a, b in zip(metrics_of(one), metrics_of(folder), strict=True):
            assert b["client_losses"] == pytest.approx(a["client_losses"], abs=2e-5), layout
