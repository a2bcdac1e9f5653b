"""The mean over clients whose adapters are the best rank-r factors of the mean update (adapters.py, rule `product`).

Legend: F elements of all factors together, n_s clients of this slot, N clients of all slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from feddra_ds.distributed.collectives import all_sum
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.masters import Fragment
from feddra_ds.engine.parts import PartState
from feddra_ds.federation.aggregation.mean import WeightedSum
from feddra_ds.federation.aggregation.peers import gather_over_peers, reduce_over_peers
from feddra_ds.model import lora


class ProductSum(WeightedSum):
    """Σ w_i θ_i, but each layer's (A, B) are the rank-r factors nearest to Σ w_i B_i A_i; only a stage with adapters.

    Factors are small, so every client's travel whole to every rank. A layer is factored on one rank alone: the signs and
    rotations of an SVD may differ between machines, and A must fit its B.
    """

    def __init__(self, engine: Engine, parts: Sequence[str], base: Mapping[str, PartState]):
        super().__init__(engine, parts, base)
        self.engine = engine
        self.layers = lora.pairs(list(engine.shapes))
        self._starts: dict[str, int] = {}  # of each factor in a row of F elements
        self._row_length = 0
        for name in (name for layer in self.layers for name in layer):
            self._starts[name] = self._row_length
            self._row_length += math.prod(engine.shapes[name])
        self._rows: list[Tensor] = []  # (F,) fp32 of each client: this rank's fragments, zeros elsewhere
        self._weights: list[float] = []

    def add(self, weight: float, state: Mapping[str, Sequence[Tensor]], client_index: int) -> None:
        super().add(weight, state, client_index)
        if weight == 0:
            return
        row = torch.zeros(self._row_length)
        for where, values in self._factors(state["backbone"]):
            row[where] = values.detach().to("cpu")
        self._rows.append(row)
        self._weights.append(weight)

    def _factors(self, state: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Where each fragment of a factor lies in a row, and its elements in a state of the backbone."""
        for fragment, values in self.engine.views_of("backbone", list(state)):
            if fragment.name in self._starts:
                yield self._place(fragment), values

    def _place(self, fragment: Fragment) -> slice:
        start = self._starts[fragment.name] + fragment.start
        return slice(start, start + fragment.length)

    def _average_parts(self, parts: Sequence[str], topology: Topology, total_weight: float) -> None:
        super()._average_parts(parts, topology, total_weight)
        rows = torch.stack(self._rows) if self._rows else torch.zeros(0, self._row_length)
        rows = self._over_the_slot(rows, topology)  # (n_s, F), whole
        weights = torch.tensor(self._weights, dtype=torch.float64).reshape(-1, 1) / total_weight
        if topology.peers is not None:
            self.num_bytes += rows.numel() * rows.element_size()
        everybodys = torch.cat(gather_over_peers(rows, topology))
        their_weights = torch.cat(gather_over_peers(weights, topology)).flatten().tolist()
        averaged = self._factored(everybodys, their_weights, topology)
        self.num_bytes += reduce_over_peers(averaged, topology)
        averaged = self._over_the_slot(averaged, topology)
        for where, values in self._factors(self.sums["backbone"]):
            values.copy_(averaged[where])

    def _factored(self, rows: Tensor, weights: Sequence[float], topology: Topology) -> Tensor:
        """(N, F), N weights of sum 1 → (F,): the averaged factors of this rank's layers, zeros elsewhere."""
        ranks_per_slot = topology.plan.ranks_per_slot
        rank = topology.live_slots.index(topology.slot) * ranks_per_slot + topology.slot_rank
        out = torch.zeros(self._row_length)
        for a, b in self.layers[rank :: len(topology.live_slots) * ranks_per_slot]:
            clients = [lora.Factors(self._whole(row, a), self._whole(row, b)) for row in rows]
            for name, factor in zip((a, b), lora.average_product(clients, weights), strict=True):
                self._whole(out, name).copy_(factor)
        return out

    def _whole(self, row: Tensor, name: str) -> Tensor:
        shape = self.engine.shapes[name]
        return row.narrow(0, self._starts[name], math.prod(shape)).view(shape)

    def _over_the_slot(self, x: Tensor, topology: Topology) -> Tensor:
        if topology.plan.ranks_per_slot == 1:
            return x
        self.num_bytes += x.numel() * x.element_size()
        return all_sum(x.to(topology.device), topology.slot_group).to("cpu")
