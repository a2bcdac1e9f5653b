"""All clients' elements side by side, chunk by chunk: each peer sees every client's, of its own share of a chunk.

Legend: S peers, n_s clients of slot s, N of all slots, c elements of a peer's share of a chunk.

A slice is cut into chunks of S · c elements. Of each, share r of every client's goes to peer r (an all-to-all), which so has
the N values of each of its c coordinates; where they make one new value each, these go round to all (an all-gather). A peer
sends n_s (S − 1) / S and, for new values, (S − 1) / S elements for each one of its slice. What it holds of it at a time does
not depend on the model: N · c elements are at most BLOCK_ELEMENTS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from feddra_ds.distributed.topology import Topology
from feddra_ds.federation.aggregation.compression import Joined
from feddra_ds.federation.aggregation.peers import gather_over_peers

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 22}  # of all clients at a time; sorting takes four times their bytes


def share_of_chunk(num_clients: int, device: str) -> int:
    """c of a whole chunk."""
    return max(1, BLOCK_ELEMENTS[device] // max(1, num_clients))


@dataclass(frozen=True)
class _Block:
    start: int  # of the chunk
    size: int  # of the chunk, without what fills it up
    values: Tensor  # (N, c) fp32, on the device: slot by slot, zeros behind a slice's end


class Exchange:
    """The rows of this slot's clients beside those of all others. Every peer builds one, with rows of the same length."""

    def __init__(self, rows: Sequence[Joined], length: int, topology: Topology, share: int | None = None):
        """rows: of each client of this slot, `length` fp32 elements each; share: c, for a test. Collective over the peers."""
        self.rows, self.length, self.topology = rows, length, topology
        mine = torch.tensor([[float(len(rows))]], dtype=torch.float64)
        self.num_clients = [int(n) for n in torch.cat(gather_over_peers(mine, topology)).flatten()]  # by slot
        self.num_bytes = 0  # handed to collectives so far
        self._share = share or share_of_chunk(sum(self.num_clients), topology.device.type)

    def gram(self, base: Joined) -> Tensor:
        """(N, N) float64 on the host: inner products of the rows less `base`, of this rank's elements. Collective over the peers.

        Peers sum the same numbers in the same order, so that it is equal on them to the bit.
        """
        num = sum(self.num_clients)
        total = torch.zeros(num, num, dtype=torch.float64, device=self.topology.device)
        for block in self._blocks(base):
            values = block.values.double()
            total.addmm_(values, values.T)
        everybodys = gather_over_peers(total.cpu().unsqueeze(0), self.topology)
        if self.topology.peers is not None:
            self.num_bytes += total.numel() * total.element_size()
        return torch.stack(everybodys).sum(dim=0)[0]

    def apply(self, rule: Callable[[Tensor], Tensor], out: Joined) -> None:
        """out ← of each coordinate what the rule, (N, c) → (c,), makes of the rows. Collective over the peers."""
        peers = self.topology.peers
        for block in self._blocks(None):
            new = rule(block.values)
            if peers is not None:
                whole = new.new_empty(len(self.num_clients) * len(new))
                peers._allgather_base(whole, new.contiguous()).wait()
                self.num_bytes += new.numel() * new.element_size()
                new = whole
            out.assign(block.start, new[: block.size])

    def _blocks(self, base: Joined | None) -> Iterator[_Block]:
        topology, slots = self.topology, len(self.num_clients)
        for start in range(0, self.length, slots * self._share):
            size = min(slots * self._share, self.length - start)
            share = -(-size // slots)
            before = torch.zeros(size, device=topology.device)
            if base is not None:
                base.add_to(before, start)
            sent = torch.zeros(len(self.rows), slots * share, device=topology.device)
            for row, joined in zip(sent, self.rows, strict=True):
                joined.add_to(row[:size], start)
                row[:size] -= before
            if topology.peers is not None:
                sent = sent.view(len(self.rows), slots, share).transpose(0, 1).contiguous()
                sent = self._all_to_all(topology.peers, sent, share)
            yield _Block(start, size, sent)

    def _all_to_all(self, peers: dist.ProcessGroup, sent: Tensor, share: int) -> Tensor:
        """(S, n_s, c) → (N, c): share r of this slot's rows to peer r, and this peer's share of all rows from them."""
        received = sent.new_empty(sum(self.num_clients), share)
        takes = [n * share for n in self.num_clients]
        peers.alltoall_base(received.view(-1), sent.view(-1), takes, [len(self.rows) * share] * len(takes)).wait()
        self.num_bytes += (len(takes) - 1) * len(self.rows) * share * sent.element_size()
        return received
