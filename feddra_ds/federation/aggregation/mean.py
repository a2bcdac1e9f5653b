"""The server average as sharded sums: slices of the clients on a slot, then over the peers.

No rank ever holds another rank's slices: the sum Σ p_i θ_i of a slot's clients gathers on its host, and each slice is
then all-reduced over its peers. A client that is left out contributes nothing at all (0 × NaN would be NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, PartState
from feddra_ds.federation.aggregation.peers import reduce_over_peers
from feddra_ds.model.lora_options import FactorName


class WeightedSum:
    """Σ w_i θ_i over clients, part by part. Floating tensors: the weighted mean; integer ones: the first client's.

    Where the first client is left out, integers stay what they were in `base`, the state that the stage started from.
    Slices that hold the factor `resting` of the adapters stay too: no client has trained them, and they do not travel.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Sequence[str],
        base: Mapping[str, PartState],
        resting: FactorName | None = None,
    ):
        self.parts = (*parts, BUFFERS)
        self.base = base
        self.rests = {part: engine.holds(part, resting) for part in parts}
        # a part's slices lie in one tensor: hundreds of them (ZeRO 0) travel in one collective, and none is copied
        self._flat: dict[str, Tensor] = {}
        self.sums: dict[str, PartState] = {BUFFERS: [torch.zeros_like(b, device="cpu") for b in engine.slices(BUFFERS)]}
        for part in parts:
            rests = self.rests[part]
            sizes = [0 if rest else s.numel() for s, rest in zip(engine.slices(part), rests, strict=True)]
            self._flat[part] = torch.zeros(sum(sizes))
            sums = self._flat[part].split(sizes)
            self.sums[part] = [old.clone() if rest else s for s, old, rest in zip(sums, base[part], rests, strict=True)]
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
        rests = self.rests.get(part, [False] * len(state))
        for total, live, rest in zip(self.sums[part], state, rests, strict=True):
            if live.is_floating_point() and weight != 0 and not rest:
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
