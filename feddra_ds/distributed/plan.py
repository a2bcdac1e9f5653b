"""Which rank is what, as arithmetic: ranks, slots, peers and the clients that a slot hosts. Needs no process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feddra_ds.common.text import listed

_MOST_ROWS = 64  # of a table for reading


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

    def slot_rank_of(self, rank: int) -> int:
        return rank % self.ranks_per_slot

    def clients_of(self, slot: int) -> list[int]:
        """Indices of the clients that a slot hosts, in the order in which it trains them."""
        return list(range(slot, self.num_clients, self.num_slots))

    def peers_of(self, slot_rank: int) -> list[int]:
        """Global ranks of equal slot rank, one per slot."""
        return [slot * self.ranks_per_slot + slot_rank for slot in range(self.num_slots)]

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

    def table(
        self, hosts: Sequence[str], devices: Sequence[str], client_ids: Sequence[str], memory: str = ""
    ) -> list[str]:
        """Who is where, as lines of text: a row a rank, of the ranks' hosts and devices; a slot's clients at its first.
        memory: what each rank is predicted to need at its peak, for reading; "" leaves that out."""
        rows = [("rank", "host", "device", "slot", "slot rank", *(["memory"] if memory else []), "clients")]
        for rank in range(min(self.world_size, _MOST_ROWS)):
            slot, slot_rank = self.slot_of(rank), self.slot_rank_of(rank)
            names = [client_ids[index] for index in self.clients_of(slot)] if client_ids and slot_rank == 0 else []
            place = (str(rank), hosts[rank], devices[rank], str(slot), str(slot_rank))
            rows.append((*place, *([memory] if memory else []), listed(names)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return lines + [f"and {self.world_size - _MOST_ROWS} more ranks"] * (self.world_size > _MOST_ROWS)

    def apart(self, hosts: Sequence[str]) -> dict[int, list[str]]:
        """The slots whose ranks are on more than one host, with these hosts."""
        out = {}
        for slot in range(self.num_slots):
            first = slot * self.ranks_per_slot
            if len(of_slot := list(dict.fromkeys(hosts[first : first + self.ranks_per_slot]))) > 1:
                out[slot] = of_slot
        return out


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
