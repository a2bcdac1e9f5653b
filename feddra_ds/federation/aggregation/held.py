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

    To those that add to it and average it is a WeightedSum. What is done over the peers may be done again, with fewer clients.
    """

    def __init__(
        self,
        config: AggregateConfig,
        engine: Engine,
        parts: Sequence[str],
        base: Mapping[str, PartState],
        resting: FactorName | None = None,
    ):
        """base: the state that the stage started from; resting: the factor of the adapters that has not trained."""
        self.config, self.engine, self.base = config, engine, base
        self.parts = (*parts, BUFFERS)
        self.rests = {part: engine.holds(part, resting) for part in parts}
        self.updates: list[Update] = []  # of this slot's clients, as they came
        self.num_bytes = 0  # handed to collectives so far
        self._resting = resting
        self._taken: list[int] = []  # indices of the clients, of all slots, that are averaged
        self._weights: dict[int, float] = {}  # of all slots' clients that are compared, by index
        self._products = torch.zeros(0, 0)  # of their updates, in the order of _weights
        self._is_whole = False  # whether they are summed over the slot

    def add(self, weight: float, state: Mapping[str, Sequence[Tensor]], client_index: int) -> None:
        """Keep a copy of a client's weights, live slices or a host state of them."""
        kept = {part: [x.detach().to("cpu", copy=True) for x in state[part]] for part in self.parts}
        self.updates.append(Update(client_index, weight, kept))

    def compare(self, topology: Topology, included: Sequence[int]) -> None:
        """Where it is asked for, the inner products of the updates of these clients. Collective over the peers."""
        self._taken = list(included)
        if not self.config.compares_updates:
            return
        mine = [update for update in self.updates if update.index in included]
        trained = lambda state: self._row(state, self.parts[:-1])
        base = trained(self.base)
        exchange = Exchange([trained(update.state) for update in mine], len(base), topology)
        self._products, self._is_whole = exchange.gram(base), False
        self.num_bytes += exchange.num_bytes
        self._weights = {int(index): weight for index, weight in _weights_over_peers(mine, topology).tolist()}

    def judge(self, topology: Topology, included: Sequence[int], total_weight: float) -> Judgement:
        """Who of these clients is averaged, by min_cosine and rule, after `compare`. Collective over the slot, equal on all
        ranks.
        """
        self._taken = list(included)
        if not self.config.compares_updates:
            return Judgement(list(included), total_weight)
        if not self._is_whole:
            self._products, self._is_whole = over_the_slot(self._products, self.engine, topology), True
        place = {index: at for at, index in enumerate(self._weights)}
        indices = sorted(index for index in place if index in included)  # whichever slots they are on
        at = [place[index] for index in indices]
        products, weights = self._products[at][:, at].numpy(), [self._weights[index] for index in indices]
        judgement = judge(self.config, indices, weights, products, total_weight)
        self._taken = judgement.included
        return judgement

    def average(self, topology: Topology, total_weight: float) -> dict[str, PartState]:
        """What the rule makes of those that were taken. Collective over the peers."""
        mine = [update for update in self.updates if update.index in self._taken]
        # without parts, where a rule of coordinates settles all but the integers, which are the first client's
        parts = () if self.config.is_by_coordinate else self.parts[:-1]
        mean = WeightedSum(self.engine, parts, self.base, self._resting)
        for update in mine:
            mean.add(update.weight, update.state, update.index)
        new = mean.average(topology, total_weight)
        self.num_bytes += mean.num_bytes
        if self.config.is_by_coordinate:
            new |= {part: [before.clone() for before in self.base[part]] for part in self.parts[:-1]}
            self._settle(new, mine, topology)
        return new

    def _settle(self, new: Mapping[str, PartState], mine: Sequence[Update], topology: Topology) -> None:
        """Overwrite, coordinate by coordinate, all that trains and the floating buffers. Padding stays what it was."""
        out = self._row(new, self.parts)
        exchange = Exchange([self._row(update.state, self.parts) for update in mine], len(out), topology)
        told = _weights_over_peers(mine, topology)
        order = told[:, 0].argsort().to(topology.device)  # of equal values, whichever slots their clients are on
        weights = told[:, 1].to(topology.device)[order]
        rule = weighted_median if self.config.rule == "median" else partial(trimmed_mean, trim=self.config.trim)
        exchange.apply(lambda values: rule(values[order], weights), out)
        self.num_bytes += exchange.num_bytes

    def _row(self, state: Mapping[str, PartState], parts: Sequence[str]) -> Joined:
        return Joined(list(elements(self.engine, parts, state, self.rests)))


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


def _weights_over_peers(updates: Sequence[Update], topology: Topology) -> Tensor:
    """(N, 2) float64, slot by slot: each client's index and weight. Collective over the peers."""
    mine = torch.tensor([[float(update.index), update.weight] for update in updates], dtype=torch.float64)
    return torch.cat(gather_over_peers(mine.view(-1, 2), topology))


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
