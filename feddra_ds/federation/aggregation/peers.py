"""Collectives over the peers: flat host tensors through the device where there is one."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from feddra_ds.distributed.topology import Topology

BUCKET_ELEMENTS = 1 << 24  # fp32 elements of one collective where slices go through the device (64 MiB)
MAX_UNDER_WAY = 4  # collectives at a time


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
