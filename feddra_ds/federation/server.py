"""The models between stages, as host states of this rank's slices: one shared model, or one per client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from feddra_ds.checkpoint.format import EMA, SHARED
from feddra_ds.common.logs import logger
from feddra_ds.config.schema import Config
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, PARTS, ModelState, PartState
from feddra_ds.federation.aggregation.compression import DeltaCodec, codec_of
from feddra_ds.federation.aggregation.delta import DeltaSum
from feddra_ds.federation.aggregation.held import HeldUpdates, Judgement
from feddra_ds.federation.aggregation.lora_rules import RULES, first_rows
from feddra_ds.federation.aggregation.mean import WeightedSum
from feddra_ds.federation.client import Client
from feddra_ds.federation.schedule import Stage
from feddra_ds.strategies import Strategy
from feddra_ds.strategies.base import Averaged, SliceState


class Server:
    """The shared model (φ_g, θ_g): clients start a stage from it, and their average becomes it."""

    codec: DeltaCodec | None = None  # of the deltas that travel; None: fp32 weights travel
    _stage: Stage  # that is being averaged
    _sum: WeightedSum | HeldUpdates
    _snapshot_sum: WeightedSum | None = None  # of the clients' weights in the midst of that stage (Stage.snapshot)
    snapshot: ModelState | None = None  # their mean, since the stage in which it was taken
    residuals: ModelState | None = None  # what rounding has kept of this slot's deltas so far (compression.py)

    def __init__(self, engine: Engine, strategy: Strategy, config: Config, topology: Topology):
        self.engine, self.strategy, self._topology = engine, strategy, topology
        self.outer: dict[str, SliceState] = {}  # by part: what Strategy.server_step keeps, on the host
        self.states: dict[str, ModelState] = {SHARED: engine.state()}
        self._ema = config.aggregate.ema
        if self._ema is not None:
            self.states[EMA] = engine.state()
        self.num_bytes = 0  # handed to collectives so far
        self._aggregate = aggregate = config.aggregate
        self.codec = codec_of(aggregate.precision, aggregate.block_size, aggregate.sparsity)
        if self.codec is not None:
            self.residuals = {part: [torch.zeros_like(s) for s in self.states[SHARED][part]] for part in PARTS}
        self._factor_sum = None if engine.adapter is None else RULES.get(engine.adapter.aggregation)
        schedule = config.schedule
        self._aligners_go_on = (
            aggregate.after_stage1 and schedule.stage1_steps > 0 and schedule.stage2_start == "client"
        )
        self._live_slots = topology.live_slots
        self._owed_at_start: PartState = []  # the aligner's residual before stage 1

    def owner_of(self, client: Client) -> str:
        """Whose model a client trains: a key of `states`."""
        return SHARED

    def model_of(self, client: Client) -> ModelState:
        """The model that a client trains, with adapters of its rank."""
        state = self.states[self.owner_of(client)]
        if client.adapter_rank is None:
            return state
        return state | {"backbone": first_rows(self.engine, state["backbone"], client.adapter_rank)}

    def live(self, stage: Stage) -> dict[str, list[Tensor]]:
        """The engine's live slices of what a stage averages."""
        return {part: self.engine.slices(part) for part in (*stage.parts, BUFFERS)}

    def begin(self, stage: Stage) -> None:
        self._stage = stage
        base = self.states[SHARED]
        if stage.snapshot is not None:
            self._snapshot_sum = self._new_snapshot_sum(stage)
        if self._aggregate.holds_updates:
            self._sum = HeldUpdates(self._aggregate, self.engine, stage.parts, base, stage.resting_factor)
            return
        if self._factor_sum is not None and stage.trains_backbone:
            self._sum = self._factor_sum(self.engine, stage, base)
            return
        if self.codec is None or self.residuals is None or (self._topology.peers is None and not self._owes()):
            self._sum = WeightedSum(self.engine, stage.parts, base, stage.resting_factor)
            return
        if self._aligners_go_on and not stage.trains_backbone:
            self._owed_at_start = [owed.clone() for owed in self.residuals["aligner"]]
        elif self._aligners_go_on and self._owed_at_start:
            # the clients went on with their own θ_i, which still hold what rounding kept from stage 1's average
            self.residuals["aligner"], self._owed_at_start = self._owed_at_start, []
        self._sum = DeltaSum(self.engine, stage.parts, base, self.codec, self.residuals, stage.resting_factor)

    def _new_snapshot_sum(self, stage: Stage) -> WeightedSum:
        base = self.states[SHARED]
        if self.codec is None or self._topology.peers is None:
            return WeightedSum(self.engine, stage.parts, base)
        # it is looked at once and forgotten: what rounding keeps of it is owed to nobody
        nothing = {part: [torch.zeros_like(s) for s in base[part]] for part in stage.parts}
        return DeltaSum(self.engine, stage.parts, base, self.codec, nothing)

    def _owes(self) -> bool:
        assert self.residuals is not None
        return any(bool(owed.any()) for state in self.residuals.values() for owed in state)

    def add(
        self,
        client: Client,
        weight: float,
        state: Mapping[str, Sequence[Tensor]],
        snapshot: ModelState | None = None,
    ) -> None:
        """Take the weights of a client that may be averaged: live slices, or a host state; and its snapshot."""
        self._sum.add(weight, state, client.index)
        if snapshot is not None and self._snapshot_sum is not None:
            self._snapshot_sum.add(weight, snapshot, client.index)

    def compare(self, topology: Topology, included: Sequence[int]) -> None:
        """Before `judge`, where updates are compared (AggregateConfig.compares_updates). Collective over the peers."""
        if isinstance(self._sum, HeldUpdates):
            self._sum.compare(topology, included)

    def judge(self, topology: Topology, included: Sequence[int], total_weight: float) -> Judgement:
        """Who of the clients that the coordinator takes is averaged, equal on all ranks. Collective over the slot."""
        if isinstance(self._sum, HeldUpdates):
            return self._sum.judge(topology, included, total_weight)
        return Judgement(list(included), total_weight)

    def finish(self, topology: Topology, total_weight: float, drift: float = 0.0) -> None:
        """θ_g ← Σ p_i θ_i / Σ p_i over the clients that were added, and the strategy's step. Collective over the peers."""
        if self.residuals is not None and topology.live_slots != self._live_slots:
            if topology.is_coordinator:
                lost = sorted(set(self._live_slots) - set(topology.live_slots))
                logger.warning("slots %s are gone, and with them what rounding kept from their deltas", lost)
            self._live_slots = topology.live_slots
        mean = self._sum.average(topology, total_weight)
        self.num_bytes += self._sum.num_bytes
        del self._sum
        if self._snapshot_sum is not None:
            self.snapshot = self.states[SHARED] | self._snapshot_sum.average(topology, total_weight)
            self.num_bytes += self._snapshot_sum.num_bytes
            self._snapshot_sum = None
        if self.strategy.steps:
            about = lambda part: Averaged(self._stage.num_steps, self._stage.learning_rates[part], total_weight, drift)
            mean |= {part: self._outer_step(part, mean[part], about(part)) for part in mean if part != BUFFERS}
        self.states[SHARED].update(mean)

    def discard(self) -> None:
        """Forget what was added: the global model stays as it was."""
        del self._sum
        self._snapshot_sum = None

    def end_round(self, round_index: int) -> None:
        """Where aggregate.ema is β, the average over the rounds k ≤ t, with weights ∝ β^(t − k), takes in the new global model.

        That is ema ← β' ema + (1 − β') θ_g with β' = β (1 − β^t)/(1 − β^(t+1)), t from 0. Integer buffers are the newest.
        """
        if self._ema is None:
            return
        beta = self._ema
        new = (1 - beta) / (1 - beta ** (round_index + 1))
        for part, averages in self.states[EMA].items():
            for average, value in zip(averages, self.states[SHARED][part], strict=True):
                if average.is_floating_point():
                    average.lerp_(value, new)
                else:
                    average.copy_(value)

    @torch.no_grad()
    def _outer_step(self, part: str, mean: PartState, about: Averaged) -> PartState:
        """The strategy's step from the old global slices of a part towards the clients' mean."""
        new = self.strategy.server_step(self.states[SHARED][part], mean, self.outer.setdefault(part, {}), about)
        if [x.shape for x in new] != [x.shape for x in mean]:
            kind = type(self.strategy).__name__
            raise ValueError(f"strategy.name: {kind}.server_step must give slices of the sizes of those it was given")
        return new

    def show(self, client: Client) -> None:
        """Put the model that a client is evaluated with into the engine. Collective over the slot."""
        self.engine.write(self.model_of(client))


class OwnModels(Server):
    """A model per client, never averaged."""

    def __init__(self, engine: Engine, clients: Iterable[Client]):
        self.engine, self.outer = engine, {}
        self.states = {client.id: engine.state() for client in clients}
        self.num_bytes = 0

    def owner_of(self, client: Client) -> str:
        return client.id

    def begin(self, stage: Stage) -> None:
        self._parts = (*stage.parts, BUFFERS)

    def add(
        self,
        client: Client,
        weight: float,
        state: Mapping[str, Sequence[Tensor]],
        snapshot: ModelState | None = None,
    ) -> None:
        self.states[client.id].update(
            {part: [s.detach().to("cpu", copy=True) for s in state[part]] for part in self._parts}
        )

    def compare(self, topology: Topology, included: Sequence[int]) -> None:
        pass

    def judge(self, topology: Topology, included: Sequence[int], total_weight: float) -> Judgement:
        return Judgement(list(included), total_weight)

    def finish(self, topology: Topology, total_weight: float, drift: float = 0.0) -> None:
        pass

    def discard(self) -> None:
        pass

    def end_round(self, round_index: int) -> None:
        pass
