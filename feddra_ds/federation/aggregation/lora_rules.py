"""Means over clients in which adapters are averaged by a rule over the factors of all (model/lora.py).

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
from feddra_ds.engine.parts import FROZEN, PartState
from feddra_ds.federation.aggregation.mean import WeightedSum
from feddra_ds.federation.aggregation.peers import gather_over_peers, reduce_over_peers
from feddra_ds.federation.schedule import Stage
from feddra_ds.model import lora
from feddra_ds.model.lora import Factors


class FactorSum(WeightedSum):
    """Σ w_i θ_i, but the adapters as `_settle` says; only of a stage that trains them.

    Factors are small, so every client's travel whole to every rank.
    """

    def __init__(self, engine: Engine, stage: Stage, base: Mapping[str, PartState]):
        super().__init__(engine, stage.parts, base)
        self.engine, self.stage = engine, stage
        self.layers = lora.pairs(list(engine.shapes))
        self._starts: dict[str, int] = {}  # of each factor in a row of F elements
        self._row_length = 0
        for name in (name for layer in self.layers for name in layer):
            self._starts[name] = self._row_length
            self._row_length += math.prod(engine.shapes[name])
        self._rows: list[Tensor] = []  # (F,) fp32 of each client: this rank's fragments, zeros elsewhere
        self._weights: list[float] = []

    def _add_part(self, part: str, weight: float, state: Sequence[Tensor]) -> None:
        if part != "backbone":
            super()._add_part(part, weight, state)
        elif weight != 0:
            row = torch.zeros(self._row_length)
            for where, values in self._factors(state):
                row[where] = values.detach().to("cpu")
            self._rows.append(row)
            self._weights.append(weight)

    def _factors(self, state: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Where each fragment of a factor lies in a row, and its elements in a state of the backbone."""
        for fragment, values in self.engine.views_of("backbone", list(state)):
            if fragment.name in self._starts:
                start = self._starts[fragment.name] + fragment.start
                yield slice(start, start + fragment.length), values

    def _average_parts(self, parts: Sequence[str], topology: Topology, total_weight: float) -> None:
        super()._average_parts([part for part in parts if part != "backbone"], topology, total_weight)
        rows = torch.stack(self._rows) if self._rows else torch.zeros(0, self._row_length)
        rows = self._over_the_slot(rows, topology)  # (n_s, F), whole
        weights = torch.tensor(self._weights, dtype=torch.float64).reshape(-1, 1) / total_weight
        if topology.peers is not None:
            self.num_bytes += rows.numel() * rows.element_size()
        everybodys = torch.cat(gather_over_peers(rows, topology))
        their_weights = torch.cat(gather_over_peers(weights, topology)).flatten().tolist()
        averaged = self._settle(everybodys, their_weights, topology)
        for where, values in self._factors(self.sums["backbone"]):
            values.copy_(averaged[where])

    def _settle(self, rows: Tensor, weights: Sequence[float], topology: Topology) -> Tensor:
        """(N, F) factors and N weights of sum 1, equal on all ranks → (F,): the new ones. Collective over all ranks."""
        raise NotImplementedError

    def _whole(self, row: Tensor, name: str) -> Tensor:
        shape = self.engine.shapes[name]
        return row.narrow(0, self._starts[name], math.prod(shape)).view(shape)

    def _layer(self, row: Tensor, layer: tuple[str, str]) -> Factors:
        return Factors(*(self._whole(row, name) for name in layer))

    def _over_the_slot(self, x: Tensor, topology: Topology) -> Tensor:
        if topology.plan.ranks_per_slot == 1:
            return x
        if self.engine.zero_stage == 0:
            return x  # every rank has the whole
        self.num_bytes += x.numel() * x.element_size()
        return all_sum(x.to(topology.device), topology.slot_group).to("cpu")


class ProductSum(FactorSum):
    """Each layer's (A, B) become the rank-r factors nearest to Σ w_i B_i A_i.

    A layer is factored on one rank alone: the signs and rotations of an SVD may differ between machines, and A must fit
    its B.
    """

    def _settle(self, rows: Tensor, weights: Sequence[float], topology: Topology) -> Tensor:
        ranks_per_slot = topology.plan.ranks_per_slot
        rank = topology.live_slots.index(topology.slot) * ranks_per_slot + topology.slot_rank
        out = torch.zeros(self._row_length)
        for layer in self.layers[rank :: len(topology.live_slots) * ranks_per_slot]:
            clients = [self._layer(row, layer) for row in rows]
            for name, factor in zip(layer, lora.average_product(clients, weights), strict=True):
                self._whole(out, name).copy_(factor)
        self.num_bytes += reduce_over_peers(out, topology)
        if ranks_per_slot > 1:
            self.num_bytes += out.numel() * out.element_size()
            out = all_sum(out.to(topology.device), topology.slot_group).to("cpu")
        return out


class ResidualSum(FactorSum):
    """(A, B) become (Σ w_i A_i, Σ w_i B_i), and the frozen weight takes s (Σ w_i B_i A_i − B A): the mean is exact.

    Each rank moves its own share of the frozen weights, from what all ranks hold alike: nothing more travels.
    """

    def _settle(self, rows: Tensor, weights: Sequence[float], topology: Topology) -> Tensor:
        mean = torch.zeros(self._row_length, dtype=torch.float64)
        for weight, row in zip(weights, rows, strict=True):
            mean.add_(row.double(), alpha=weight)
        new = mean.float()
        self._move_frozen([*rows, new], [*weights, -1.0])
        return new

    @torch.no_grad()
    def _move_frozen(self, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
        """W ← W + s Σ w B A over rows of factors, in this rank's share of each frozen weight W."""
        adapter = self.engine.adapter
        assert adapter is not None
        layers = {lora.frozen_weight(layer[0]): layer for layer in self.layers}
        for fragment, values in self.engine.views(FROZEN):
            num_inputs = self.engine.shapes[fragment.name][1]
            first, end = fragment.start // num_inputs, fragment.start + fragment.length
            lines = slice(first, -(-end // num_inputs))
            factors = [self._layer(row, layers[fragment.name]) for row in rows]
            update = lora.rows_of_update(factors, weights, lines).view(-1)
            mine = update[fragment.start - first * num_inputs : end - first * num_inputs]
            values.copy_(values.double() + adapter.scale * mine)
        self.engine.show_frozen()


class StackSum(ResidualSum):
    """The frozen weight takes s Σ w_i B_i A_i whole; then B is 0, and A drawn anew, for whatever rank a client has.

    A client of rank r_i has zeros behind the first r_i rows of A and columns of B, which get no gradient. The factors are
    not kept as a global adapter: that would grow by Σ r_i each round, and no client could go on with it.
    """

    def _settle(self, rows: Tensor, weights: Sequence[float], topology: Topology) -> Tensor:
        self._move_frozen(list(rows), weights)
        new = torch.zeros(self._row_length)
        for a, _ in self.layers:
            self._whole(new, a).copy_(lora.draw(a, self.engine.shapes[a], times=self.stage.round_index + 1))
        return new


RULES: dict[str, type[FactorSum]] = {"product": ProductSum, "residual": ResidualSum, "stack": StackSum}
"""By `model.adapter.aggregation`; the other rules are means of factors, each by itself."""


def first_rows(engine: Engine, state: PartState, rank: int) -> PartState:
    """A state of the backbone in which every A has zeros behind its first rows: the adapters of a client of lower rank."""
    out = [tensor.clone() for tensor in state]
    for fragment, values in engine.views_of("backbone", out):
        if lora.factor_of(fragment.name) == "a":
            kept = rank * engine.shapes[fragment.name][1] - fragment.start
            values[max(0, kept) :] = 0
    return out
