"""Whether a client's update may be averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine


def validate_update(engine: Engine, topology: Topology, parts: Sequence[str]) -> str | None:
    """Why the live weights cannot be averaged, or None; the same answer on every rank of the slot."""
    finite = torch.ones(1, device=topology.device)
    weights = [values for part in parts for _, values in engine.views(part)]  # without padding, which may be garbage
    for values in (*weights, *(b for b in engine.buffers().values() if b.is_floating_point())):
        finite.mul_(torch.isfinite(values.sum()))
    if topology.plan.ranks_per_slot > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=topology.slot_group)
    return None if finite.item() == 1 else "its weights are not finite after the stage"
