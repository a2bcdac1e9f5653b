"""The plan: pure arithmetic over ranks, slots, shards and clients."""

from __future__ import annotations

import pytest
import torch

from feddra_ds.distributed.launch import Launch, choose_device
from feddra_ds.distributed.plan import plan


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("clients", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize("width", [None, 1, 2, 3, 4])
def test_every_rank_has_one_place_and_every_client_one_slot(world: int, clients: int, width: int | None) -> None:
    try:
        p = plan(world, clients, width)
    except ValueError as error:
        assert width is not None
        assert world % width or world // width > clients
        assert "topology.ranks_per_slot" in str(error)
        return
    assert p.num_slots * p.ranks_per_slot == world
    places = [(p.slot_of(rank), p.slot_rank_of(rank)) for rank in range(world)]
    assert sorted(places) == [(s, w) for s in range(p.num_slots) for w in range(p.ranks_per_slot)]
    assert sorted(i for slot in range(p.num_slots) for i in p.clients_of(slot)) == list(range(clients))
    for slot_rank in range(p.ranks_per_slot):
        peers = p.peers_of(slot_rank)
        assert [p.slot_of(rank) for rank in peers] == list(range(p.num_slots))
        assert {p.slot_rank_of(rank) for rank in peers} == {slot_rank}
    loads = [len(p.clients_of(slot)) for slot in range(p.num_slots)]
    assert max(loads) - min(loads) <= 1
    assert min(loads) >= 1


def test_the_default_takes_the_most_slots_that_divide() -> None:
    assert plan(8, 5).num_slots == 4
    assert plan(4, 5).ranks_per_slot == 1
    assert plan(1, 5).describe() == "1 rank = 1 slot × 1 rank, 5 clients, at most 5 per slot"


def test_refusals_say_what_fits() -> None:
    with pytest.raises(ValueError, match=r"6 ranks do not divide into slots of 4; choose one of \[2, 3, 6\]"):
        plan(6, 3, 4)
    with pytest.raises(ValueError, match="4 slots for 2 clients"):
        plan(4, 2, 1)
    with pytest.raises(ValueError, match="at least one rank"):
        plan(0, 1)


def test_launch_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    alone = Launch.from_environment()
    assert (alone.rank, alone.world_size) == (0, 1)
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "29",
    }.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(3, 4, 1, "h", 29)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent() -> None:
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(ValueError, match=r"run\.device: cuda was asked for"):
        choose_device("cuda", 0)
