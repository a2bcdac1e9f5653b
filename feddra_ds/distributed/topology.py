"""This process's place in the plan: the process groups, and the store behind them.

slot: a group of ranks which hosts clients · slot rank: a rank's index in its slot · peers: ranks of equal slot rank across
slots · client: a data owner, simulated on a slot. Each slot is a torch.distributed world of its own, so DeepSpeed
believes that its client is all there is; slots meet only in the store and in the peer groups.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from feddra_ds.common.errors import WaitTimeout
from feddra_ds.common.logs import logger
from feddra_ds.common.text import size
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.meeting import Place, address_of, meet
from feddra_ds.distributed.messages import Messages
from feddra_ds.distributed.plan import Plan

_ROLL_CALL_S = 5.0


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of a rank at its peak: of its host, and of its GPU, 0 without one."""

    host: int
    device: int = 0

    def __str__(self) -> str:
        return size(self.host) + (f" + {size(self.device)} GPU" if self.device else "")


class Topology(Messages):
    """This process's place in the plan: its slot's group (the default process group), its peers and the store."""

    # who and where
    plan: Plan
    rank: int
    slot: int
    slot_rank: int
    device: torch.device
    places: list[Place]  # of all ranks, by rank
    # how long any wait may last, in seconds
    timeout_s: float
    # the slots that still take part, and the peers of this slot rank in them: None where one slot is left
    live_slots: tuple[int, ...]
    peers: dist.ProcessGroup | None

    def __init__(
        self,
        plan: Plan,
        launch: Launch,
        device: torch.device,
        timeout_s: float,
        *,
        common: Mapping[str, Any] | None = None,
        client_ids: Sequence[str] = (),
        interface: str | None = None,
        memory: Memory | None = None,
    ):
        """Every rank calls it. common: see meeting.meet. client_ids: of all clients, and memory: of a rank at its peak, both
        for the plan that rank 0 logs before the groups are made. interface: the network interface of the store, gloo and NCCL.

        Raises ConfigError, WaitTimeout.
        """
        self.plan, self.rank, self.device, self.timeout_s = plan, launch.rank, device, timeout_s
        self.slot, self.slot_rank = plan.slot_of(launch.rank), plan.slot_rank_of(launch.rank)
        timeout = timedelta(seconds=timeout_s)
        if interface is not None:
            address_of(interface)
            os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=f"={interface}")  # = : no mere prefix
        self.store, self.places = meet(launch, str(device), timeout_s, common, interface)
        if self.is_coordinator and plan.world_size > 1:
            self._say_who_is_where(client_ids, memory)
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

    def _say_who_is_where(self, client_ids: Sequence[str], memory: Memory | None) -> None:
        hosts, devices = [place.host for place in self.places], [place.device for place in self.places]
        for line in self.plan.table(hosts, devices, client_ids, "" if memory is None else str(memory)):
            logger.info("%s", line)
        for slot, of_slot in self.plan.apart(hosts).items():
            logger.warning(
                f"slot {slot} lies on {' and '.join(of_slot)}: each of its steps crosses the network; choose "
                "topology.ranks_per_slot and the ranks of each host so that no slot is torn"
            )
        if memory is None:
            return
        for host in dict.fromkeys(hosts):
            needed, free = hosts.count(host) * memory.host, max(p.free for p in self.places if p.host == host)
            if needed > free:
                logger.warning(
                    f"{host}: its {hosts.count(host)} ranks will need {size(needed)} at their peak, and {size(free)} are free; "
                    "feddra-ds doctor --plan says what would save memory"
                )

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
        num = len(self.live_slots)
        if num == 1:
            return None
        store = dist.PrefixStore(f"peer/{generation}/{self.slot_rank}", self.store)
        timeout = timedelta(seconds=self.timeout_s)
        rank = self.live_slots.index(self.slot)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, rank, num, options))
        return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, num, timeout))

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
        with contextlib.suppress(WaitTimeout):  # where the coordinator is gone, the store is
            self.post(f"{key}/{self.rank}", True, timeout_s=_ROLL_CALL_S)
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
