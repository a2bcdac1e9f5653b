"""Which rank is what: the plan (pure), then the process groups and the store behind it (DESIGN 1).

slot: a group of ranks which hosts clients · shard: a rank's index in its slot · peers: ranks of equal shard across
slots · client: a data owner, simulated on a slot. Each slot is a torch.distributed world of its own, so DeepSpeed
believes that its client is all there is; slots meet only in the store and in the peer groups.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

_LONGEST_NAP = 0.25  # seconds between two looks at the store
_ROLL_CALL_S = 5.0


@dataclass(frozen=True)
class Plan:
    """world_size ranks as num_slots × ranks_per_slot, hosting num_clients clients."""

    world_size: int
    num_clients: int
    ranks_per_slot: int

    @property
    def num_slots(self) -> int:
        return self.world_size // self.ranks_per_slot

    def slot_of(self, rank: int) -> int:
        return rank // self.ranks_per_slot

    def shard_of(self, rank: int) -> int:
        return rank % self.ranks_per_slot

    def clients_of(self, slot: int) -> list[int]:
        """Indices of the clients that a slot hosts, in the order in which it trains them."""
        return list(range(slot, self.num_clients, self.num_slots))

    def peers_of(self, shard: int) -> list[int]:
        """Global ranks of equal shard, one per slot."""
        return [slot * self.ranks_per_slot + shard for slot in range(self.num_slots)]

    def describe(self) -> str:
        ranks, slots, each, clients = (
            f"{count} {word}{'s' * (count != 1)}"
            for count, word in (
                (self.world_size, "rank"),
                (self.num_slots, "slot"),
                (self.ranks_per_slot, "rank"),
                (self.num_clients, "client"),
            )
        )
        return f"{ranks} = {slots} × {each}, {clients}, at most {len(self.clients_of(0))} per slot"


def plan(world_size: int, num_clients: int, ranks_per_slot: int | None = None) -> Plan:
    """Arrange ranks into slots. ranks_per_slot None takes the most slots that divide the world, up to one per client.

    Raises ValueError where the numbers do not fit, with what would.
    """
    if world_size < 1 or num_clients < 1:
        raise ValueError(f"need at least one rank and one client, got {world_size} ranks and {num_clients} clients")
    if ranks_per_slot is None:
        num_slots = max(n for n in range(1, min(world_size, num_clients) + 1) if world_size % n == 0)
        ranks_per_slot = world_size // num_slots
    fits = [w for w in range(1, world_size + 1) if world_size % w == 0 and world_size // w <= num_clients]
    if ranks_per_slot < 1 or world_size % ranks_per_slot:
        raise ValueError(
            f"topology.ranks_per_slot: {world_size} ranks do not divide into slots of {ranks_per_slot}; "
            f"choose one of {fits} or launch a multiple of {ranks_per_slot} ranks"
        )
    if world_size // ranks_per_slot > num_clients:
        raise ValueError(
            f"topology.ranks_per_slot: {world_size} ranks in slots of {ranks_per_slot} are "
            f"{world_size // ranks_per_slot} slots for {num_clients} clients, so some would idle; choose one of {fits}"
        )
    return Plan(world_size, num_clients, ranks_per_slot)


class WaitTimeout(RuntimeError):
    """A bounded wait ended; the message says for whom and how long."""


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @staticmethod
    def from_environment() -> Launch:
        """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or a world of one where there is no launcher."""
        env = os.environ
        if "RANK" not in env:
            return Launch(0, 1, 0, "127.0.0.1", 0)  # the store takes a port that is free
        return Launch(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )


class Topology:
    """This process's place in the plan: its slot's group (the default process group), its peers and the store."""

    # who and where
    plan: Plan
    rank: int
    slot: int
    shard: int
    device: torch.device
    # how long any wait may last, in seconds
    timeout_s: float
    # the slots that still take part, and the peers of this shard in them: None where one slot is left
    live_slots: tuple[int, ...]
    peers: dist.ProcessGroup | None

    def __init__(self, plan: Plan, launch: Launch, device: torch.device, timeout_s: float):
        self.plan, self.rank, self.device, self.timeout_s = plan, launch.rank, device, timeout_s
        self.slot, self.shard = plan.slot_of(launch.rank), plan.shard_of(launch.rank)
        timeout = timedelta(seconds=timeout_s)
        self.store = _meet(launch, timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"slot/{self.slot}", self.store),
            rank=self.shard,
            world_size=plan.ranks_per_slot,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        self.live_slots = tuple(range(plan.num_slots))
        self.peers = self._join_peers(generation=0)
        self._messages = dist.PrefixStore("message", self.store)

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    @property
    def is_slot_leader(self) -> bool:
        return self.shard == 0

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
        store = dist.PrefixStore(f"peer/{generation}/{self.shard}", self.store)
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
                self.fetch(f"{key}/{self.plan.peers_of(self.shard)[slot]}", sender=who, timeout_s=left)
            except WaitTimeout:
                silent.append(who)
        return ", ".join(silent) or "a peer"

    # Messages: small JSON values by key, read by any number of ranks.
    def post(self, key: str, value: Any) -> None:
        """Publish a JSON value under a key."""
        self._messages.set(key, json.dumps(value))

    def fetch(self, key: str, *, sender: str, timeout_s: float | None = None) -> Any:
        """Wait for a key and return its value. Raises WaitTimeout, naming `sender`, after timeout_s seconds."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        began = time.monotonic()
        try:
            while not self._messages.check([key]):
                waited = time.monotonic() - began
                if waited >= limit:
                    raise WaitTimeout(
                        f"rank {self.rank} waited {limit:.0f} s for {key} from {sender}; is it still running? "
                        "(clients.timeout_s bounds this wait)"
                    )
                time.sleep(min(_LONGEST_NAP, 0.001 + 0.02 * waited))  # short naps, so that Ctrl-C and SIGTERM are heard
            return json.loads(self._messages.get(key))
        except dist.DistNetworkError as error:
            raise WaitTimeout(
                f"rank {self.rank} lost the coordinator (rank 0) while it waited for {key}: {error}"
            ) from None

    def forget(self, key: str) -> None:
        """Delete a message that every reader has read."""
        self._messages.delete_key(key)

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


def _meet(launch: Launch, timeout: timedelta) -> dist.TCPStore:
    """The store that rank 0 serves. Raises WaitTimeout where its port is taken, or nobody serves it in time."""
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


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank for run.device; raises ValueError where CUDA is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
