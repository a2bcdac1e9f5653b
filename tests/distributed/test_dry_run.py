"""A launch without a training, on real ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from helpers import tree, write_dataset
from spawn import RankError, run_ranks

NUM_CLIENTS, BATCH = 16, 8


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "many", {f"c{i:02d}": BATCH for i in range(NUM_CLIENTS)})


def dry(rank: int, world_size: int, config: dict[str, Any], broken: int | None = None) -> list[str]:
    """`feddra_ds.train` of this rank; the lines that it logs. broken: a rank whose number is one too large."""
    import torch.distributed as dist

    from feddra_ds.run.train import train

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("feddra_ds")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    if rank == broken:
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda x, **kw: all_reduce(x.add_(1), **kw)
    result = train(config)
    assert result.rounds == []
    assert not dist.is_initialized()
    return told


@pytest.mark.parametrize("world_size", [8, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_all_groups_are_formed_and_nothing_is_written(many: Path, tmp_path: Path, world_size: int) -> None:
    out = tmp_path / "run"
    config = tree(many, out, topology__dry_run=True, topology__ranks_per_slot=4, clients__timeout_s=400.0)
    lines, *others = run_ranks(dry, world_size, config, init_group=False, timeout=500)
    slots = world_size // 4
    assert not out.exists()
    assert not any(others), "a rank beside 0 says something"
    assert lines[0].split() == ["rank", "host", "device", "slot", "slot", "rank", "clients"]
    assert [int(line.split()[0]) for line in lines[1 : world_size + 1]] == list(range(world_size))
    assert lines[world_size + 1].startswith(
        f"topology.dry_run: {world_size} ranks = {slots} slots × 4 ranks, 16 clients"
    )
    assert f"each of 4 groups of {slots} peers added up a number" in lines[world_size + 1]
    assert len(lines) == world_size + 2


def test_a_group_that_adds_up_wrongly_is_named(many: Path, tmp_path: Path) -> None:
    config = tree(many, tmp_path / "run", topology__dry_run=True, topology__ranks_per_slot=2, clients__timeout_s=20.0)
    with pytest.raises(RankError, match=r"its slot added up to \d+, not to"):
        run_ranks(dry, 4, config, 3, init_group=False, timeout=120)
