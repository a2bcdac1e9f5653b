"""Updates that are kept apart until all clients are known, then judged, and averaged without those that are excluded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from feddra_ds.config.schema import AggregateConfig
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, PartState
from feddra_ds.federation.aggregation.compression import Joined
from feddra_ds.federation.aggregation.exchange import Exchange
from feddra_ds.federation.aggregation.mean import WeightedSum
from feddra_ds.federation.aggregation.peers import gather_over_peers
from feddra_ds.federation.aggregation.rules import Matrix, cosines, multi_krum, trimmed_mean, weighted_median
from feddra_ds.model.lora_options import FactorName


@dataclass(frozen=True)
class Judgement:
    """Who is averaged, equal on all ranks."""

    included: list[int]  # indices of the clients
    total_weight: float  # Σ of their weights in the average
    excluded: dict[int, str] = field(default_factory=dict)  # why, by the client's index
    cosines: dict[int, float] = field(default_factory=dict)  # by the client's index; empty where nobody asks


@dataclass(frozen=True)
class Update:
    """A client's weights after a stage, on the host, with its weight in the average."""

    index: int
    weight: float
    state: dict[str, PartState]


class HeldUpdates:
    """This slot's updates of a stage. Its memory: for each client of the slot one more copy of the slices that train.

    It is a WeightedSum to those that add to it and average; `judge` and `average` may be called again, among fewer clients.
    """

    def __init__(
        self,
        config: AggregateConfig,
        engine: Engine,
        parts: Sequence[str],
        base: Mapping[str, PartState],
        resting: FactorName | None = None,
    ):
        """base: the state that the stage started from."""
        self.config, self.engine, self.parts = config, engine, (*parts, BUFFERS)
        self.base, self.resting = base, resting
        self.num_bytes = 0  # handed to collectives so far
        self.updates: list[Update] = []  # of this slot's clients, as they came
        self._taken: list[Update] = []

    def add(self, weight: float, state: Mapping[str, Sequence[Tensor]], client_index: int) -> None:
        """Keep a copy of a client's weights, live slices or a host state of them."""
        kept = {part: [x.detach().to("cpu", copy=True) for x in state[part]] for part in self.parts}
        self.updates.append(Update(client_index, weight, kept))

    def judge(self, topology: Topology, included: Sequence[int], total_weight: float) -> Judgement:
        """Who of the clients that the coordinator takes is averaged, by min_cosine and rule. Collective over all ranks."""
        self._taken = [update for update in self.updates if update.index in included]
        if not self.config.compares_updates:
            return Judgement(list(included), total_weight)
        judgement = judge(self.config, *self._compared(topology), total_weight)
        self._taken = [update for update in self._taken if update.index in judgement.included]
        return judgement

    def average(self, topology: Topology, total_weight: float) -> dict[str, PartState]:
        """The average of those that were taken. Collective over the peers."""
        parts = [part for part in self.parts if part != BUFFERS]
        if self.config.is_by_coordinate:
            average: WeightedSum = RobustSum(self.engine, parts, self.base, self.config, self.resting)
        else:
            average = WeightedSum(self.engine, parts, self.base, self.resting)
        for update in self._taken:
            average.add(update.weight, update.state, update.index)
        new = average.average(topology, total_weight)
        self.num_bytes += average.num_bytes
        return new

    def _compared(self, topology: Topology) -> tuple[list[int], list[float], Matrix]:
        """Of all slots' clients, by index: their indices, weights and the inner products of their updates, whole."""
        engine, parts = self.engine, [part for part in self.parts if part != BUFFERS]
        rests = {part: engine.holds(part, self.resting) for part in parts}
        row_of = lambda state: Joined(list(elements(engine, parts, state, rests)))
        base = row_of(self.base)
        exchange = Exchange([row_of(update.state) for update in self._taken], len(base), topology)
        products = over_the_slot(exchange.gram(base), engine, topology)
        self.num_bytes += exchange.num_bytes
        about = [[float(update.index), update.weight] for update in self._taken]
        everybodys = torch.cat(gather_over_peers(torch.tensor(about, dtype=torch.float64).view(-1, 2), topology))
        order = everybodys[:, 0].argsort()  # whichever slot a client is on
        indices, weights = everybodys[order].T.tolist()
        return [int(i) for i in indices], weights, products[order][:, order].numpy()


def judge(
    config: AggregateConfig, indices: Sequence[int], weights: Sequence[float], products: Matrix, total_weight: float
) -> Judgement:
    """Who of the clients is averaged: first by min_cosine, then by Krum, for which the ones found count as bad.

    products: (n, n) inner products of their updates; total_weight: Σ of their weights, as the coordinator told it.
    """
    every = cosines(products)
    left, excluded = list(range(len(indices))), {}
    if config.min_cosine is not None:
        for i in np.flatnonzero(every < config.min_cosine).tolist():
            excluded[indices[i]] = (
                f"its update's cosine to the others' is {every[i]:.3f}, below aggregate.min_cosine = {config.min_cosine:g}"
            )
        left = [i for i in left if indices[i] not in excluded]
    num_bad = config.num_bad - len(excluded)
    if config.rule == "krum" and num_bad > 0 and left:
        chosen, scores = multi_krum(products[np.ix_(left, left)], num_bad)
        limit = scores[chosen].max()
        for at in sorted(set(range(len(left))) - set(chosen)):
            excluded[indices[left[at]]] = (
                f"its Krum score {scores[at]:.4g} is among the {num_bad} largest, those of the others are up to {limit:.4g}"
            )
        left = [left[at] for at in chosen]
    total = total_weight if not excluded else float(sum(weights[i] for i in left))
    told = {index: float(cosine) for index, cosine in zip(indices, every, strict=True)}
    return Judgement([indices[i] for i in left], total, excluded, told)


class RobustSum(WeightedSum):
    """Of each coordinate the weighted median or trimmed mean over the clients, in place of their weighted mean.

    Floating buffers are settled alike, integers as WeightedSum does. Padding stays what it is in `base`.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Sequence[str],
        base: Mapping[str, PartState],
        config: AggregateConfig,
        resting: FactorName | None = None,
    ):
        super().__init__(engine, parts, base, resting)
        self.engine, self.config = engine, config
        for part in parts:
            for total, before in zip(self.sums[part], base[part], strict=True):
                total.copy_(before)
        self._rows: list[Joined] = []
        self._weights: list[float] = []

    def add(self, weight: float, state: Mapping[str, Sequence[Tensor]], client_index: int) -> None:
        """Take a client's host state, without a copy; a weight of 0 has no say."""
        super().add(0.0, state, client_index)  # the first client's integers
        if weight > 0:
            self._rows.append(Joined(list(elements(self.engine, self.parts, state, self.rests))))
            self._weights.append(weight)

    def _average_parts(self, parts: Sequence[str], topology: Topology, total_weight: float) -> None:
        out = Joined(list(elements(self.engine, self.parts, self.sums, self.rests)))
        exchange = Exchange(self._rows, len(out), topology)
        mine = torch.tensor(self._weights, dtype=torch.float64).view(-1, 1)
        weights = torch.cat(gather_over_peers(mine, topology)).flatten().to(topology.device)
        if len(weights) == 0:
            return
        if self.config.rule == "median":
            rule = partial(weighted_median, weights=weights)
        else:
            rule = partial(trimmed_mean, weights=weights, trim=self.config.trim)
        exchange.apply(rule, out)
        self.num_bytes += exchange.num_bytes

    def _average_buffers(self, topology: Topology, total_weight: float) -> None:
        for buffer in self.sums[BUFFERS]:
            if not buffer.is_floating_point():
                self._reduce(buffer, topology, total_weight)


def elements(
    engine: Engine, parts: Sequence[str], state: Mapping[str, Sequence[Tensor]], without: Mapping[str, Sequence[bool]]
) -> Iterator[Tensor]:
    """What of a state is settled, as flat views: fragments without padding and without what rests, and floating buffers."""
    for part in parts:
        if part == BUFFERS:
            yield from (buffer for buffer in state[BUFFERS] if buffer.is_floating_point())
        else:
            yield from (values for _, values in engine.views_of(part, list(state[part]), without[part]))


def over_the_slot(products: Tensor, engine: Engine, topology: Topology) -> Tensor:
    """The sum of (N, N) products over the shares of a slot's ranks, equal on them to the bit. Collective over the slot."""
    if topology.plan.ranks_per_slot == 1:
        return products
    mine = products.to(topology.device)
    every = [torch.empty_like(mine) for _ in range(topology.plan.ranks_per_slot)]
    dist.all_gather(every, mine, group=topology.slot_group)
    # with ZeRO 0 each rank has the whole
    return (torch.stack(every).sum(dim=0) if engine.zero_stage > 0 else every[0]).cpu()
