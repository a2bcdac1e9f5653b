"""The server average as sharded sums: slices of the clients on a slot, then over the peers (DESIGN 2).

No rank ever holds another rank's slices: the sum Σ p_i θ_i of a slot's clients gathers on its host, and each slice is
then all-reduced over its peers. A client that is left out contributes nothing at all (0 × NaN would be NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .engine import BUFFERS, Engine, PartState
from .topology import Topology

BUCKET_ELEMENTS = 1 << 24  # fp32 elements of one collective where slices go through the device (64 MiB)


def validate_update(engine: Engine, topology: Topology, parts: Sequence[str]) -> str | None:
    """Why the live weights cannot be averaged, or None; the same answer on every rank of the slot."""
    finite = torch.ones(1, device=topology.device)
    for part in parts:
        for live in engine.slices(part):
            if live.is_floating_point() and not torch.isfinite(live.sum()):
                finite.zero_()
    if topology.plan.ranks_per_slot > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=topology.slot_group)
    return None if finite.item() == 1 else "its weights are not finite after the stage"


class WeightedSum:
    """Σ w_i θ_i over clients, part by part. Floating tensors: the weighted mean; integer ones: the first client's."""

    def __init__(self, engine: Engine, parts: Sequence[str]):
        self.parts = (*parts, BUFFERS)
        self.sums: dict[str, PartState] = {
            part: [torch.zeros_like(s, device="cpu") for s in engine.slices(part)] for part in self.parts
        }
        self.num_bytes = 0

    def add(self, weight: float, state: Mapping[str, Sequence[Tensor]], client_index: int) -> None:
        """Add a client's weights, live slices or a host state of them; a weight of 0 adds nothing."""
        for part in self.parts:
            for total, live in zip(self.sums[part], state[part], strict=True):
                if not live.is_floating_point():
                    if client_index == 0:
                        total.copy_(live)
                elif weight != 0:
                    total.add_(live.detach().to(total.device), alpha=weight)

    def average(self, topology: Topology, total_weight: float) -> dict[str, PartState]:
        """Sum over the peers and divide by the weight of all clients that were added. Collective over peers."""
        for part in self.parts:
            for total in self.sums[part]:
                self.num_bytes += reduce_over_peers(total, topology)
                if total.is_floating_point() and total_weight != 1:
                    total.div_(total_weight)
        return self.sums


def reduce_over_peers(tensor: Tensor, topology: Topology) -> int:
    """Sum a flat host tensor over the peers, in place; returns the bytes handed to the collective."""
    peers = topology.peers
    if peers is None:
        return 0
    if topology.device.type == "cpu":
        peers.allreduce([tensor]).wait()
    else:
        for bucket in tensor.split(BUCKET_ELEMENTS):
            on_device = bucket.to(topology.device)
            peers.allreduce([on_device]).wait()
            bucket.copy_(on_device)
    return tensor.numel() * tensor.element_size()


def gather_over_peers(tensor: Tensor, topology: Topology) -> list[Tensor]:
    """The (n_s, …) tensors of all slots, in slot order, on every peer; n_s may differ. dtype is kept."""
    peers = topology.peers
    if peers is None:
        return [tensor]
    num_slots = len(topology.live_slots)
    size = torch.tensor([tensor.shape[0]], dtype=torch.int64, device=topology.device)
    sizes = [torch.zeros_like(size) for _ in range(num_slots)]
    peers.allgather([sizes], [size]).wait()
    longest = max(int(s) for s in sizes)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]), device=topology.device)
    padded[: tensor.shape[0]] = tensor
    out = [torch.zeros_like(padded) for _ in range(num_slots)]
    peers.allgather([out], [padded]).wait()
    return [chunk[: int(n)].to(tensor.device) for chunk, n in zip(out, sizes, strict=True)]


def state_distance(a: Mapping[str, PartState], b: Mapping[str, PartState]) -> float:
    """Largest absolute difference between two states of this rank."""
    return max(
        (float((x - y).abs().max()) for part in a for x, y in zip(a[part], b[part], strict=True) if x.numel()),
        default=0.0,
    )
