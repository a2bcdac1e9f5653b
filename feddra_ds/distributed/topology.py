"""This process's place in the plan: the process groups, and the store behind them.

slot: a group of ranks which hosts clients · slot rank: a rank's index in its slot · peers: ranks of equal slot rank across
slots · client: a data owner, simulated on a slot. Each slot is a torch.distributed world of its own, so DeepSpeed
believes that its client is all there is; slots meet only in the store and in the peer groups.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from feddra_ds.common.errors import WaitTimeout
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.messages import Messages
from feddra_ds.distributed.plan import Plan

_ROLL_CALL_S = 5.0


class Topology(Messages):
    """This process's place in the plan: its slot's group (the default process group), its peers and the store."""

    # who and where
    plan: Plan
    rank: int
    slot: int
    slot_rank: int
    device: torch.device
    # how long any wait may last, in seconds
    timeout_s: float
    # the slots that still take part, and the peers of this slot rank in them: None where one slot is left
    live_slots: tuple[int, ...]
    peers: dist.ProcessGroup | None

    def __init__(self, plan: Plan, launch: Launch, device: torch.device, timeout_s: float):
        self.plan, self.rank, self.device, self.timeout_s = plan, launch.rank, device, timeout_s
        self.slot, self.slot_rank = plan.slot_of(launch.rank), plan.slot_rank_of(launch.rank)
        timeout = timedelta(seconds=timeout_s)
        self.store = _meet(launch, timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"slot/{self.slot}", self.store),
            rank=self.slot_rank,
            world_size=plan.ranks_per_slot,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        self.live_slots = tuple(range(plan.num_slots))
        self.peers = self._join_peers(generation=0)
        super().__init__(dist.PrefixStore("message", self.store), launch.rank, timeout_s)

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    @property
    def is_slot_leader(self) -> bool:
        return self.slot_rank == 0

    @property
    def slot_group(self) -> dist.ProcessGroup:
        """The ranks of this slot."""
        group = dist.group.WORLD
        assert group is not None
        return group

    @property
    def live_ranks(self) -> list[int]:
        """Global ranks of the slots that still take part."""
        return [rank for rank in range(self.plan.world_size) if self.plan.slot_of(rank) in self.live_slots]

    def drop_slots(self, live_slots: Sequence[int], generation: int) -> None:
        """Go on with these slots only: the peers meet again under a new generation. Every live rank calls it."""
        self.live_slots = tuple(live_slots)
        self.peers = self._join_peers(generation)

    def _join_peers(self, generation: int) -> dist.ProcessGroup | None:
        size = len(self.live_slots)
        if size == 1:
            return None
        store = dist.PrefixStore(f"peer/{generation}/{self.slot_rank}", self.store)
        timeout = timedelta(seconds=self.timeout_s)
        rank = self.live_slots.index(self.slot)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, rank, size, options))
        return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, timeout))

    @contextlib.contextmanager
    def peers_meet(self, place: str) -> Iterator[None]:
        """Around collectives over the peers: where a peer dies in one, WaitTimeout says which slots no longer answer."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if not isinstance(error, dist.DistError) and "gloo" not in first:
                raise
            traceback.clear_frames(
                error.__traceback__
            )  # they hold the group; without it the other peers fail at once too
            self.peers = None
            raise WaitTimeout(
                f"rank {self.rank} lost {self._roll_call(place)} while the peers met for {place}; the same command goes on from "
                f"the last checkpoint ({first})"
            ) from None

    def _roll_call(self, place: str) -> str:
        """Who of the peers does not tell within seconds that this place failed for it too."""
        key, deadline, silent = f"{place}/failed", time.monotonic() + _ROLL_CALL_S, []
        with contextlib.suppress(dist.DistNetworkError):  # where the coordinator is gone, the store is
            self.post(f"{key}/{self.rank}", True)
        for slot in self.live_slots:
            who = "the coordinator (rank 0)" if slot == 0 else f"slot {slot}"
            try:
                left = max(0.0, deadline - time.monotonic())
                self.fetch(f"{key}/{self.plan.peers_of(self.slot_rank)[slot]}", sender=who, timeout_s=left)
            except WaitTimeout:
                silent.append(who)
        return ", ".join(silent) or "a peer"

    def leave_after_reading(self, key: str, live_slots: Sequence[int]) -> None:
        """Before the run ends early: rank 0, whose store dies with it, waits (a bounded time) until the others know why."""
        self.post(f"{key}/{self.rank}", True)
        if not self.is_coordinator:
            return
        deadline = time.monotonic() + min(30.0, self.timeout_s)
        for rank in range(self.plan.world_size):
            if self.plan.slot_of(rank) in live_slots:
                with contextlib.suppress(WaitTimeout):  # it will hear that the coordinator is gone
                    left = max(0.0, deadline - time.monotonic())
                    self.fetch(f"{key}/{rank}", sender=f"rank {rank}", timeout_s=left)

    def close(self) -> None:
        """Leave the groups together: rank 0, which serves the store, waits (a bounded time) until the others have left."""
        self.post(f"done/{self.rank}", True)
        if self.is_coordinator:
            for rank in self.live_ranks:
                self.fetch(f"done/{rank}", sender=f"rank {rank}")
            self.post("all-done", True)
        self.fetch("all-done", sender="the coordinator (rank 0)")
        self.peers = None
        if dist.is_initialized():
            dist.destroy_process_group()
        self.post(f"left/{self.rank}", True)
        if self.is_coordinator:
            for rank in self.live_ranks:
                self.fetch(f"left/{rank}", sender=f"rank {rank}", timeout_s=30)


_stores: dict[tuple[str, int], tuple[dist.TCPStore, Iterator[int]]] = {}  # by address and port


def _meet(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store that rank 0 serves, for one run.

    Under a launcher, whose port all runs of its processes share, the store lives as long as the process, and each run
    has a name of its own in it: a rank that is early in the next run must not read what the last one left.
    Raises WaitTimeout where the port is taken, or nobody serves it in time.
    """
    if launch.port == 0:  # the store takes a port that is free
        return _connect(launch, timeout)
    place = launch.address, launch.port
    if place not in _stores:
        _stores[place] = _connect(launch, timeout), itertools.count()
    store, runs = _stores[place]
    store.set_timeout(timeout)
    return dist.PrefixStore(f"run/{next(runs)}", store)


def _connect(launch: Launch, timeout: timedelta) -> dist.TCPStore:
    place = f"{launch.address}:{launch.port}"
    try:
        return dist.TCPStore(
            launch.address, launch.port, launch.world_size, launch.rank == 0, timeout, wait_for_workers=False
        )
    except dist.DistError as error:
        if launch.rank == 0:
            todo = "is another job using it? choose another: deepspeed --master_port PORT, or MASTER_PORT"
            raise WaitTimeout(f"rank 0 cannot serve the run's store at {place}; {todo}") from error
        first = str(error).splitlines()[0]
        raise WaitTimeout(f"rank {launch.rank} cannot reach the coordinator (rank 0) at {place}: {first}") from None
