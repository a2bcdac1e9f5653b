"""Slots are worlds of their own and meet in the store and over their peers; every wait there is bounded and names someone."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_run, finish, on_ranks, tree, zero


def _topology(num_clients: int, per_slot: int, timeout_s: float = 60.0) -> Any:
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.distributed.plan import plan
    from feddra_ds.distributed.topology import Topology

    launch = Launch.from_environment()
    return Topology(plan(launch.world_size, num_clients, per_slot), launch, torch.device("cpu"), timeout_s)


# ---- inside a rank
def sums(per_slot: int) -> dict[str, Any]:
    """Collectives of both kinds, each rank putting in 10 to the power of its rank."""
    import torch.distributed as dist

    from feddra_ds.federation.aggregation.peers import gather_over_peers, reduce_over_peers

    topology = _topology(4, per_slot)
    mine = torch.tensor([10.0**topology.rank])
    over_slot, over_peers = mine.clone(), mine.clone()
    dist.all_reduce(over_slot, group=topology.slot_group)
    num_bytes = reduce_over_peers(over_peers, topology)
    rows = torch.full((topology.slot + 1, 2), topology.rank, dtype=torch.int64)
    gathered = gather_over_peers(rows, topology)
    if topology.rank == 2:
        topology.post("told", {"by": topology.rank})
    told = topology.fetch("told", sender="rank 2")
    seen = {
        "slot": over_slot.item(), "peers": over_peers.item(), "bytes": num_bytes, "told": told,
        "gathered": [x.tolist() for x in gathered], "dtype": gathered[0].dtype == torch.int64,
        "ranks": dist.get_world_size(topology.slot_group), "coordinator": topology.is_coordinator,
        "leader": topology.is_slot_leader, "live": topology.live_ranks,
    }  # fmt: skip
    topology.close()
    return seen


def regroup() -> dict[str, Any]:
    """Four slots, of which two are dropped, one after the other; the others' sums afterwards."""
    from feddra_ds.federation.aggregation.peers import gather_over_peers, reduce_over_peers

    topology = _topology(4, 1)
    out: dict[str, Any] = {}
    for generation, live in ((0, (0, 1, 2, 3)), (1, (0, 2, 3)), (2, (0, 3)), (3, (0,))):
        if topology.slot not in live:
            break
        if generation:
            topology.drop_slots(live, generation)
        x = torch.tensor([10.0**topology.rank])
        reduce_over_peers(x, topology)
        out[str(generation)] = (x.item(), [int(t) for t in gather_over_peers(torch.tensor([topology.rank]), topology)])
        out["live"] = topology.live_ranks
    topology.post(f"end/{topology.rank}", True)
    for rank in range(4):
        topology.fetch(f"end/{rank}", sender=f"rank {rank}")
    topology.live_slots = (0, 1, 2, 3)
    topology.close()
    return out


def wait_in_vain() -> dict[str, Any]:
    """Messages that nobody sends, a peer that does not come, and a store that is gone."""
    from feddra_ds.common.errors import WaitTimeout

    topology = _topology(2, 1, timeout_s=2.0)
    out: dict[str, Any] = {}
    began = time.monotonic()
    with pytest.raises(WaitTimeout) as error:
        topology.fetch("never", sender="slot 7", timeout_s=1)
    out["message"], out["waited"] = str(error.value), time.monotonic() - began
    began = time.monotonic()
    if topology.rank == 0:
        with pytest.raises(RuntimeError):
            topology.drop_slots((0, 1), 1)  # slot 1 does not call it
    out["peers"] = time.monotonic() - began
    topology.post(f"ready/{topology.rank}", True)
    topology.fetch(f"ready/{1 - topology.rank}", sender="the other rank", timeout_s=30)
    topology.post(f"read/{topology.rank}", True)
    if topology.rank == 0:
        topology.fetch("read/1", sender="rank 1", timeout_s=30)
        _end_of_process(topology)
        return out
    began = time.monotonic()
    with pytest.raises(WaitTimeout) as error:
        topology.fetch("never", sender="the coordinator (rank 0)", timeout_s=60)
    out["lost"], out["lost_after"] = str(error.value), time.monotonic() - began
    _end_of_process(topology)
    return out


def lose_a_peer() -> str | None:
    """Rank 1 of three slots ends while the others are in a sum with it; what rank 0 and 2 are told."""
    import gc

    from feddra_ds.common.errors import WaitTimeout
    from feddra_ds.federation.aggregation.peers import reduce_over_peers

    topology = _topology(3, 1, timeout_s=60.0)
    told = None
    if topology.rank == 1:
        topology.peers = None
        gc.collect()
    else:
        with pytest.raises(WaitTimeout) as error, topology.peers_meet("the average of round 2, stage1"):
            reduce_over_peers(torch.ones(1 << 20), topology)
        told = str(error.value)
    if topology.rank == 1:
        for rank in (0, 2):  # in the sum while this one is there
            topology.fetch(f"told/{rank}", sender=f"rank {rank}")
    topology.post(f"told/{topology.rank}", True)
    if topology.rank == 0:  # serves the store, so it leaves last
        for rank in (1, 2):
            topology.fetch(f"told/{rank}", sender=f"rank {rank}")
    _end_of_process(topology)
    return told


def _end_of_process(topology: Any) -> None:
    """What the end of its process does to a topology: the groups and, on rank 0, the store that it serves go away."""
    import gc

    import torch.distributed as dist

    from feddra_ds.distributed.meeting import _stores

    topology.peers = topology._messages = topology.store = None
    dist.destroy_process_group()
    _stores.clear()
    gc.collect()


def steps_apart(config_tree: dict[str, Any]) -> int:
    """ZeRO-3 with 3 steps on one slot and 7 on the other, which hangs where DeepSpeed sees one world; then an average."""
    from feddra_ds.federation.aggregation.peers import reduce_over_peers
    from feddra_ds.federation.schedule import Stage

    run = build_run(config_tree)
    client = run.clients[0]
    steps = 3 + 4 * run.topology.slot
    stage = Stage("stage2", steps, 0.01, True, averages=True, hands_on_aligner=False, moves_mixture=False)
    result = run.trainer.run_stage(client, stage, run.server.model_of(client), 1.0)
    for part in ("aligner", "backbone"):
        for state in run.engine.snapshot(part):
            reduce_over_peers(state, run.topology)
    finish(run)
    return result.num_pairs


# ---- tests
def test_slots_and_peers_are_separate_worlds() -> None:
    two_by_two = on_ranks(sums, 4, 2)
    assert [seen["slot"] for seen in two_by_two] == [11.0, 11.0, 1100.0, 1100.0]
    assert [seen["peers"] for seen in two_by_two] == [101.0, 1010.0, 101.0, 1010.0]
    assert [seen["bytes"] for seen in two_by_two] == [4, 4, 4, 4]
    assert all(seen["told"] == {"by": 2} and seen["dtype"] and seen["ranks"] == 2 for seen in two_by_two)
    for seen, other in zip(two_by_two[:2], two_by_two[2:], strict=True):
        assert seen["gathered"] == other["gathered"]
    assert two_by_two[1]["gathered"] == [[[1, 1]], [[3, 3], [3, 3]]]  # slot 1 gave two rows
    assert [seen["coordinator"] for seen in two_by_two] == [True, False, False, False]
    assert [seen["leader"] for seen in two_by_two] == [True, False, True, False]
    one_slot = on_ranks(sums, 4, 4)
    assert [seen["slot"] for seen in one_slot] == [1111.0] * 4
    assert [seen["peers"] for seen in one_slot] == [1.0, 10.0, 100.0, 1000.0]
    assert [seen["bytes"] for seen in one_slot] == [0] * 4
    four_slots = on_ranks(sums, 4, 1)
    assert [seen["slot"] for seen in four_slots] == [1.0, 10.0, 100.0, 1000.0]
    assert [seen["peers"] for seen in four_slots] == [1111.0] * 4


def test_those_who_are_left_meet_again() -> None:
    by_rank = on_ranks(regroup, 4)
    assert [seen["0"] for seen in by_rank] == [(1111.0, [0, 1, 2, 3])] * 4
    assert [by_rank[rank]["1"] for rank in (0, 2, 3)] == [(1101.0, [0, 2, 3])] * 3
    assert [by_rank[rank]["2"] for rank in (0, 3)] == [(1001.0, [0, 3])] * 2
    assert by_rank[0]["3"] == (1.0, [0])
    assert "1" not in by_rank[1]
    assert by_rank[0]["live"] == [0]


def test_a_port_that_is_taken_is_named() -> None:
    from datetime import timedelta

    from feddra_ds.common.errors import WaitTimeout
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.distributed.meeting import _store

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            WaitTimeout, match=f"rank 0 cannot serve the run's store at 127.0.0.1:{port}; .*--master_port"
        ):
            _store(Launch(0, 2, 0, "127.0.0.1", port), timedelta(seconds=5))
    with pytest.raises(WaitTimeout, match=rf"rank 1 cannot reach the coordinator \(rank 0\) at 127.0.0.1:{port}"):
        _store(Launch(1, 2, 1, "127.0.0.1", port), timedelta(seconds=2))


def test_a_peer_that_dies_in_an_average_is_named() -> None:
    first, nobody, third = on_ranks(lose_a_peer, 3, timeout=90)
    assert nobody is None
    for rank, told in ((0, first), (2, third)):
        assert told.startswith(
            f"rank {rank} lost slot 1 while the peers met for the average of round 2, stage1; the same"
        )


def test_every_wait_ends_and_says_for_whom_it_was() -> None:
    first, second = on_ranks(wait_in_vain, 2, timeout=90)
    for rank, seen in enumerate((first, second)):
        assert seen["message"].startswith(f"rank {rank} waited 1 s for never from slot 7")
        assert "clients.timeout_s" in seen["message"]
        assert 1 <= seen["waited"] < 8
    assert first["peers"] < 20
    assert "lost the coordinator (rank 0) while it waited for never" in second["lost"]
    assert second["lost_after"] < 20


@pytest.mark.slow
def test_two_slots_may_take_different_numbers_of_steps(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, deepspeed=zero(3), topology__ranks_per_slot=2, clients__ids=["north", "south"])
    assert on_ranks(steps_apart, 4, config) == [24, 24, 56, 56]
