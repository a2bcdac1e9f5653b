"""Memory over rounds and over ranks, in fresh processes, as the operating system counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import build_run, finish, tree, zero
from spawn import run_ranks


def resident_by_round(rank: int, world_size: int, config_tree: dict[str, Any]) -> dict[str, Any]:
    """Resident bytes of this rank after each round, and its peak at the end."""
    import gc

    import psutil

    run = build_run(config_tree)
    process, resident = psutil.Process(), []
    save = run.save

    def measure(*args: Any) -> None:
        save(*args)
        gc.collect()
        resident.append(process.memory_info().rss)

    run.save = measure
    run.rounds()
    peak = run.memory.peak
    finish(run)
    return {"resident": resident, "peak": peak}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (2, 3))])
def test_memory_does_not_grow_with_the_rounds(dataset: Path, tmp_path: Path, stage: int) -> None:
    config = tree(
        dataset, tmp_path, deepspeed=zero(stage), schedule__rounds=12, optimizer__name="adamw", evaluation__every=3
    )
    (seen,) = run_ranks(resident_by_round, 1, config, init_group=False, timeout=500)
    third, tenth = seen["resident"][2], seen["resident"][9]
    assert tenth <= 1.02 * third, [f"{bytes_ / 2**20:.1f} MiB" for bytes_ in seen["resident"]]


@pytest.mark.slow
def test_the_coordinator_holds_no_more_than_any_other_rank(dataset: Path, tmp_path: Path) -> None:
    """A model large enough to be seen: an extra copy of it on rank 0 would be a tenth of its memory and more."""
    body = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    config = tree(
        dataset,
        tmp_path,
        deepspeed=zero(2),
        topology__ranks_per_slot=2,
        optimizer__name="adamw",
        clients__ids=["north", "south"],
        model__vision__config={"model_type": "vit", "patch_size": 8, **body},
        model__text__config={"model_type": "bert", **body},
    )
    by_rank = run_ranks(resident_by_round, 4, config, init_group=False, timeout=500)
    first, *others = [seen["peak"] for seen in by_rank]
    shown = [f"{seen['peak'] / 2**20:.0f} MiB" for seen in by_rank]
    assert first <= 1.05 * max(others), shown
