"""The server average as sharded sums: slices of the clients on a slot, then over the peers (DESIGN 2).

No rank ever holds another rank's slices: the sum Σ p_i θ_i of a slot's clients gathers on its host, and each slice is
then all-reduced over its peers. A client that is left out contributes nothing at all (0 × NaN would be NaN).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .compression import Codec, CompressedSum
from .engine import BUFFERS, Engine, PartState
from .topology import Topology

BUCKET_ELEMENTS = 1 << 24  # fp32 elements of one collective where slices go through the device (64 MiB)
MAX_UNDER_WAY = 4  # collectives at a time


def validate_update(engine: Engine, topology: Topology, parts: Sequence[str]) -> str | None:
    """Why the live weights cannot be averaged, or None; the same answer on every rank of the slot."""
    finite = torch.ones(1, device=topology.device)
    weights = [values for part in parts for _, values in engine.views(part)]  # without padding, which may be garbage
    for values in (*weights, *(b for b in engine.buffers().values() if b.is_floating_point())):
        finite.mul_(torch.isfinite(values.sum()))
    if topology.plan.ranks_per_slot > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=topology.slot_group)
    return None if finite.item() == 1 else "its weights are not finite after the stage"


class WeightedSum:
    """Σ w_i θ_i over clients, part by part. Floating tensors: the weighted mean; integer ones: the first client's.

    Where the first client is left out, integers stay what they were in `base`, the state that the stage started from.
    """

    def __init__(self, engine: Engine, parts: Sequence[str], base: Mapping[str, PartState]):
        self.parts = (*parts, BUFFERS)
        self.base = base
        # a part's slices lie in one tensor: hundreds of them (ZeRO 0) travel in one collective, and none is copied
        self._flat: dict[str, Tensor] = {}
        self.sums: dict[str, PartState] = {BUFFERS: [torch.zeros_like(b, device="cpu") for b in engine.slices(BUFFERS)]}
        for part in parts:
            sizes = [s.numel() for s in engine.slices(part)]
            self._flat[part] = torch.zeros(sum(sizes))
            self.sums[part] = list(self._flat[part].split(sizes))
        self.num_bytes = 0
        self._has_integers = False

    def add(self, weight: float, state: Mapping[str, Sequence[Tensor]], client_index: int) -> None:
        """Add a client's weights, live slices or a host state of them; a weight of 0 adds nothing."""
        for part in self.parts:
            self._add_part(part, weight, state[part])
        if client_index == 0:
            self._has_integers = True
            for total, live in zip(self.sums[BUFFERS], state[BUFFERS], strict=True):
                if not live.is_floating_point():
                    total.copy_(live)

    def _add_part(self, part: str, weight: float, state: Sequence[Tensor]) -> None:
        for total, live in zip(self.sums[part], state, strict=True):
            if live.is_floating_point() and weight != 0:
                total.add_(live.detach().to(total.device), alpha=weight)

    def average(self, topology: Topology, total_weight: float) -> dict[str, PartState]:
        """Sum over the peers and divide by the weight of all clients that were added. Collective over peers."""
        if topology.slot == 0 and not self._has_integers:  # the slot of the first client and of the coordinator
            for total, before in zip(self.sums[BUFFERS], self.base[BUFFERS], strict=True):
                if not total.is_floating_point():
                    total.copy_(before)
        self._average_parts([part for part in self.parts if part != BUFFERS], topology, total_weight)
        for buffer in self.sums[BUFFERS]:
            self._reduce(buffer, topology, total_weight)
        return self.sums

    def _average_parts(self, parts: Sequence[str], topology: Topology, total_weight: float) -> None:
        for part in parts:
            self._reduce(self._flat[part], topology, total_weight)

    def _reduce(self, total: Tensor, topology: Topology, total_weight: float) -> None:
        self.num_bytes += reduce_over_peers(total, topology)
        if total.is_floating_point() and total_weight != 1:
            total.div_(total_weight)


class DeltaSum(WeightedSum):
    """The same mean by way of the deltas θ_i − θ_g, which travel encoded; buffers and padding stay exact.

    residuals: by part, fp32 host tensors like the slices; what rounding has kept of this slot's earlier deltas, in units
    of the mean. It is added to the delta and left behind anew. With one slot nothing travels and nothing is rounded.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Sequence[str],
        base: Mapping[str, PartState],
        codec: Codec,
        residuals: Mapping[str, PartState],
    ):
        super().__init__(engine, parts, base)
        self.engine, self.codec, self.residuals = engine, codec, residuals

    def _add_part(self, part: str, weight: float, state: Sequence[Tensor]) -> None:
        if part == BUFFERS:
            super()._add_part(part, weight, state)
        elif weight != 0:
            for total, live, before in self._views(part, self.sums[part], state, self.base[part]):
                for piece, new, old in zip(*(x.split(BUCKET_ELEMENTS) for x in (total, live, before)), strict=True):
                    piece.add_(new.detach().to(piece.device) - old, alpha=weight)

    def _average_parts(self, parts: Sequence[str], topology: Topology, total_weight: float) -> None:
        pairs = [pair for part in parts for pair in self._views(part, self.sums[part], self.residuals[part])]
        deltas, residuals = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if total_weight != 1:
            for delta in deltas:
                delta.div_(total_weight)
        if topology.peers is None:
            for delta, residual in zip(deltas, residuals, strict=True):
                delta.add_(residual)
                residual.zero_()
        else:
            rank, size = topology.live_slots.index(topology.slot), len(topology.live_slots)
            exchange = CompressedSum(self.codec, topology.peers, rank, size, topology.device)
            exchange.run(deltas, residuals)
            self.num_bytes += exchange.num_bytes
        for part in parts:
            for total, before in zip(self.sums[part], self.base[part], strict=True):
                total.add_(before)  # padding has no delta

    def _views(self, part: str, *states: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """The elements of a part's fragments, without padding, in each of several states of it."""
        for views in zip(*(self.engine.views_of(part, list(state)) for state in states), strict=True):
            yield tuple(values for _, values in views)


def reduce_over_peers(tensor: Tensor, topology: Topology) -> int:
    """Sum a flat host tensor over the peers, in place; returns the bytes handed to collectives.

    Through a device it goes in buckets, a few of them under way at a time.
    """
    peers = topology.peers
    if peers is None:
        return 0
    under_way: deque[tuple[Any, Tensor, Tensor]] = deque()
    for bucket in [tensor] if topology.device.type == "cpu" else tensor.split(BUCKET_ELEMENTS):
        sent = bucket.to(topology.device)
        under_way.append((peers.allreduce([sent]), bucket, sent))
        if len(under_way) == MAX_UNDER_WAY:
            _land(*under_way.popleft())
    while under_way:
        _land(*under_way.popleft())
    return tensor.numel() * tensor.element_size()


def _land(work: Any, bucket: Tensor, sent: Tensor) -> None:
    work.wait()
    if sent is not bucket:
        bucket.copy_(sent)


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
