"""A client whose shard cannot be read any more is excluded, with the reason, and the others go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import build_run, finish, metrics_of, on_ranks, tree, write_dataset

from feddra_ds.common.errors import TooFewClients


def lose_a_shard(config: dict[str, Any], shard: str) -> str | None:
    """All rounds of a run whose shard vanishes between the checks and the training; why it ended early, or None."""
    run = build_run(config)
    if run.topology.rank == 0:
        Path(shard).rename(f"{shard}.gone")
        run.topology.post("gone", True)
    run.topology.fetch("gone", sender="rank 0")
    try:
        run.rounds()
    except TooFewClients as error:
        return str(error)
    finally:
        finish(run)
    return None


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_slot", "order"),
    [
        (1, 1, "exact"),
        pytest.param(2, 2, "streaming", marks=pytest.mark.slow),
        pytest.param(3, 1, "exact", marks=pytest.mark.slow),
        pytest.param(2, 2, "exact", marks=pytest.mark.exhaustive),
    ],
)
def test_a_lost_shard_excludes_its_client_alone(
    num_ranks: int, ranks_per_slot: int, order: str, tmp_path: Path
) -> None:
    """As one slot, as one slot of two ranks that meet in collectives, and as a slot that has no client left."""
    root = write_dataset(tmp_path / "data")
    shard = root / "south" / "train-000000.tar"
    more = {"dro__evaluation_pairs": 6, "dro__evaluate_on": "train", "data__order": order}
    config = tree(root, tmp_path / "run", topology__ranks_per_slot=ranks_per_slot, **more)
    assert on_ranks(lose_a_shard, num_ranks, config, str(shard)) == [None] * num_ranks
    lines = metrics_of(tmp_path / "run")
    assert len(lines) == 2
    south = lines[0]["client_ids"].index("south")
    for line in lines:
        (excluded,) = line["excluded_clients"]
        assert excluded["id"] == "south"
        assert excluded["reason"] == f"{shard}: cannot be read for client south: No such file or directory"
        assert [loss is None for loss in line["client_losses"]] == [i == south for i in range(3)]
        assert set(line["val"]) == {"north", "south", "west", "all"}, "its val split can be read"
        assert math.isfinite(line["mean_loss"])
        assert line["samples"] == 2 * 5 * 8, "five steps of each of two clients"


@pytest.mark.slow
def test_too_few_clients_end_the_run_with_the_reason(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    shard = root / "south" / "train-000000.tar"
    config = tree(root, tmp_path / "run", clients__minimum=3)
    (reason,) = on_ranks(lose_a_shard, 1, config, str(shard))
    assert "2 clients gave a valid update, clients.minimum is 3; south: " in reason
    assert f"{shard}: cannot be read" in reason
