"""A client's local training: restore, anchors, steps. Runs on every rank of the client's slot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from feddra_ds.common.logs import logger
from feddra_ds.common.text import listed
from feddra_ds.config.schema import Config
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.words import Words
from feddra_ds.distributed.collectives import all_sum, first_text, gather, gather_uneven
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, ModelState, PartState
from feddra_ds.federation.aggregation.admission import validate_update
from feddra_ds.federation.aggregation.norms import too_large
from feddra_ds.federation.anchors import Fresh, NoAnchors, Replay, Resident, SharedBackbone
from feddra_ds.federation.pairs import Pairs
from feddra_ds.federation.protocol import ClientReport, Loss
from feddra_ds.federation.readable import Readable
from feddra_ds.federation.schedule import Stage
from feddra_ds.federation.step import AddedLoss, LocalStep, StepObserver, anchor_gradient_ratio
from feddra_ds.objectives.base import Objective
from feddra_ds.objectives.features import Features
from feddra_ds.strategies import Strategy
from feddra_ds.strategies.base import SliceState


@dataclass
class Client:
    """A data owner: its data, where it stands in them, and what it carries from stage to stage."""

    index: int
    id: str
    data: ClientData
    val: ClientData | None = None  # pairs whose losses move p; None where training pairs do (dro.evaluate_on)
    position: Position = field(default_factory=lambda: Position(0, 0))
    aligner: dict[str, PartState] | None = None  # its own θ_i (and buffers) after stage 1, on the host
    corrections: dict[str, SliceState] = field(
        default_factory=dict
    )  # by part: what Strategy.correct keeps, on the host
    pairs: Pairs | None = None  # what the objective keeps of each pair, on the host
    # its own model of the last round that it trained in (Strategy.added_loss), on the host
    previous: ModelState | None = None
    adapter_rank: int | None = None  # where it is below that of the engine's adapters


@dataclass(frozen=True)
class LocalResult:
    """What a stage gave.

    mean_loss: of its steps; num_pairs: pairs trained on; problem: why not to average it, or None; anchor_loss: L_i of
    the model that the stage started from, where dro.evaluate_on = anchors reads it off; anchor_gradient_ratio: of its
    last step (step.anchor_gradient_ratio), or None where there are no anchors; num_skipped: steps that changed nothing;
    squared_drift: ‖w_i − w_global‖² of what trained, where Strategy.fold_drifts or aggregate.max_norm_ratio asks for it;
    snapshot: what the stage
    averages, on the host, as it was after Stage.snapshot steps.
    """

    mean_loss: float
    num_pairs: int
    problem: str | None
    anchor_loss: Loss | None = None
    anchor_gradient_ratio: float | None = None
    num_skipped: int = 0
    squared_drift: float | None = None
    snapshot: ModelState | None = None

    def report(self) -> ClientReport:
        """What the coordinator is told: a number that is not finite is None."""
        train_loss = self.mean_loss if math.isfinite(self.mean_loss) else None
        ratio = self.anchor_gradient_ratio
        if ratio is not None and not math.isfinite(ratio):
            ratio = None
        return ClientReport(self.problem, self.anchor_loss, train_loss, self.num_pairs, ratio, self.squared_drift)


@dataclass
class _Tally:
    """The losses of a stage's steps, and the steps that were skipped because a loss or gradient was not finite."""

    good: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    in_a_row: int = 0
    longest: int = 0

    def add(self, step: int, value: float, *, was_taken: bool) -> None:
        if was_taken:
            self.good.append(value)
            self.in_a_row = 0
            return
        self.skipped.append(step)
        self.in_a_row += 1
        self.longest = max(self.longest, self.in_a_row)

    @property
    def mean(self) -> float:
        total = 0.0
        for value in self.good:
            total += value
        return total / len(self.good) if self.good else float("nan")


class LocalTrainer:
    """Trains any client of a slot on the slot's one engine, stage by stage."""

    def __init__(
        self,
        engine: Engine,
        frozen_aligner: nn.Module,
        frozen_model: nn.Module | None,
        objective: Objective,
        strategy: Strategy,
        config: Config,
        topology: Topology,
        observer: StepObserver | None = None,
        words: Words | None = None,
    ):
        self.engine, self.objective, self.strategy = engine, objective, strategy
        self.config, self.topology = config, topology
        self.frozen_aligner = frozen_aligner  # holds θ_g in stage 1, beside the live θ_i on the same backbone pass
        self.frozen_model = frozen_model  # holds (φ_g, θ_g) in stage 2 where objective.anchors is resident
        self.group = topology.slot_group if topology.plan.ranks_per_slot > 1 else None
        self.measures_drift = strategy.folds_drifts or (
            strategy.averages and config.aggregate.max_norm_ratio is not None
        )
        self.observer = observer or StepObserver()
        self.step = LocalStep(engine, objective, self.group, config.data.micro_batch_size, self.observer, words)

    def run_stage(
        self,
        client: Client,
        stage: Stage,
        global_state: ModelState,
        loss_weight: float,
        on_step: Callable[[int, float], None] | None = None,
        outer: Mapping[str, SliceState] | None = None,
        norm_limit: float | None = None,
    ) -> LocalResult:
        """Train one client for one stage; the engine holds its weights afterwards.

        global_state: this rank's slices of (φ_g, θ_g); loss_weight: factor of the whole loss (N p_i where dro.apply
        says so, else 1); outer: Server.outer; norm_limit: the largest ‖w_i − w_global‖ that is averaged. Collective over the
        slot.
        """
        engine = self.engine
        readable = Readable(client.data)
        previous = self._previous(client, stage, readable)
        engine.write(global_state)
        anchors = self._anchors(client, stage, previous, readable)
        if stage.trains_backbone and client.aligner is not None:
            engine.write(client.aligner)
        client.aligner = None
        engine.reset_optimizer()
        engine.set_learning_rates(stage.learning_rates, stage.resting_factor)
        engine.train()
        self.step.pairs = client.pairs
        correction = self._correction(client, stage, global_state, outer or {})
        tally, anchor_losses, snapshot = _Tally(), [], None
        for step, batch in enumerate(anchors.batches):
            source = lambda rows, part, hidden, step=step: anchors.of(step, rows, part, hidden)
            added_loss = None if previous is None else self._added_loss(previous.stored[step])
            self.observer.begin_step(client.id, stage, step)
            value = self.step(
                batch, source, train_backbone=stage.trains_backbone, weight=loss_weight, added_loss=added_loss
            )
            if stage.moves_mixture:
                anchor_losses.append(self._anchor_losses(batch))
            if correction is not None and self.step.was_taken:
                correction.apply()
            if step + 1 == stage.snapshot:
                snapshot = {part: engine.snapshot(part) for part in (*stage.parts, BUFFERS)}
            self.observer.end_step(value)
            tally.add(step, value, was_taken=self.step.was_taken)
            if on_step is not None:
                on_step(step, value)
        client.position = client.data.advance(client.position, stage.num_steps)
        fault = first_text(readable.fault, self.group, self.topology.device)
        problem = self._problem(client, stage, tally) if fault is None else fault
        drift = self._squared_drift(stage, global_state) if self.measures_drift and problem is None else None
        if drift is not None and norm_limit is not None and drift > norm_limit**2:
            problem = too_large(math.sqrt(drift), norm_limit)
        if correction is not None:
            correction.keep(len(tally.good) if problem is None else None)
        if stage.keeps_aligner and problem is None:
            client.aligner = {part: engine.snapshot(part) for part in ("aligner", BUFFERS)}
        if fault is not None:  # the steps, or some of them, were on blank pairs
            return LocalResult(math.nan, 0, problem)
        if stage.ends_round and problem is None and self.strategy.adds_loss:
            client.previous = engine.state()
        anchor_loss = Loss.of(torch.cat(anchor_losses)) if anchor_losses else None
        num_pairs = len(tally.good) * self.config.data.batch_size
        ratio = self._anchor_gradient_ratio()
        return LocalResult(tally.mean, num_pairs, problem, anchor_loss, ratio, len(tally.skipped), drift, snapshot)

    @torch.no_grad()
    def _squared_drift(self, stage: Stage, global_state: ModelState) -> float:
        """‖w_i − w_global‖² over the parts that train. Collective over the slot, equal on its ranks."""
        engine, total = self.engine, torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for part in stage.parts:
            pairs = zip(engine.views(part), engine.views_of(part, global_state[part]), strict=True)
            for (_, now), (_, before) in pairs:
                total += (now - before.to(now.device)).double().square().sum().to(total.device)
        is_sharded = engine.zero_stage > 0 and self.group is not None
        return float(all_sum(total, self.group) if is_sharded else total)

    def _problem(self, client: Client, stage: Stage, tally: _Tally) -> str | None:
        """Why the client's weights cannot be averaged, or None; skipped steps are said in the log."""
        if tally.skipped:
            steps = listed([str(step) for step in tally.skipped])
            logger.warning("client %s: %s skipped %d of %d steps, whose loss or gradient was not finite: %s",
                           client.id, stage.name, len(tally.skipped), stage.num_steps, steps)  # fmt: skip
        problem = validate_update(self.engine, self.topology, stage.parts)
        if not tally.good:
            problem = (
                f"all {len(tally.skipped)} steps of {stage.name} were skipped, as their loss or gradient was not finite"
            )
        elif tally.longest >= self.config.optimizer.max_skipped_steps:
            problem = f"{tally.longest} steps in a row had a non-finite loss or gradient (optimizer.max_skipped_steps)"
        return problem

    def _previous(self, client: Client, stage: Stage, readable: Readable) -> Replay | None:
        """The embeddings of the stage's batches under the client's own last model, where Strategy.added_loss wants them.

        The engine holds that model afterwards.
        """
        if client.previous is None or not self.strategy.adds_loss:
            return None
        self.engine.write(client.previous)
        data, fresh = self.config.data, lambda: readable.batches(client.position, stage.num_steps)
        room = data.replay_cache_bytes
        return Replay(fresh, self.engine, self.objective, data.micro_batch_size, room, with_tokens=False)

    def _added_loss(self, previous: Features) -> AddedLoss:
        """Strategy.added_loss as a mean over the client's batch, in the objective's scale."""

        def mean(features: Features, anchors: Features | None) -> Tensor:
            assert anchors is not None
            per_pair = self.strategy.added_loss(features, anchors, previous)
            return gather(per_pair, self.group, "slice").mean() / self.objective.loss_scale

        return mean

    def _anchors(self, client: Client, stage: Stage, previous: Replay | None, readable: Readable) -> NoAnchors:
        """The stage's batches and their anchors; called while the engine holds the global model."""
        engine, objective, data = self.engine, self.objective, self.config.data
        fresh: Fresh = lambda: readable.batches(client.position, stage.num_steps)
        if previous is not None:
            fresh = previous.fresh  # decoded already, where there was room
        elif not objective.needs_anchors:
            return NoAnchors(fresh())
        if not stage.trains_backbone:
            return SharedBackbone(fresh(), engine, self.frozen_aligner, objective)
        if self.frozen_model is not None:
            return Resident(fresh(), engine, self.frozen_model, objective)
        return Replay(fresh, engine, objective, data.micro_batch_size, data.replay_cache_bytes)

    def _correction(
        self, client: Client, stage: Stage, global_state: ModelState, outer: Mapping[str, SliceState]
    ) -> _Correction | None:
        if not self.strategy.corrects:
            return None
        return _Correction(self.engine, self.strategy, client, stage, global_state, outer)

    def _anchor_gradient_ratio(self) -> float | None:
        """That of the stage's last step, in which the client has gone furthest from the global model."""
        features, anchors = self.step.last_features, self.step.last_anchors
        if features is None or anchors is None:
            return None
        return anchor_gradient_ratio(self.objective, features, anchors, self.group)

    def _anchor_losses(self, batch: Batch) -> Tensor:
        """Per-pair losses of the global model on this batch, from the anchors that the step has just used.

        In batches of dro.evaluation_batch_size over the whole of the client's batch: (pairs,) fp32, equal on every rank.
        """
        anchors = self.step.last_anchors
        assert anchors is not None
        ids = gather_uneven(batch.text_ids.to(anchors.image.device), self.group)
        image, text = (gather_uneven(x, self.group) for x in (anchors.image, anchors.text))
        temperature = self.frozen_aligner.get_submodule("temperature")()
        size = self.config.dro.evaluation_batch_size
        losses = []
        for i in range(0, len(ids) // size * size, size):
            u, v = (nn.functional.normalize(x[i : i + size].float(), dim=-1) for x in (image, text))
            losses.append(self.objective.per_pair(Features(u, v, temperature=temperature), ids[i : i + size]))
        return torch.cat(losses).cpu()


class _Correction:
    """What a strategy does to a client's slices after each local step of a stage (Strategy.correct)."""

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        client: Client,
        stage: Stage,
        global_state: ModelState,
        outer: Mapping[str, SliceState],
    ):
        self.engine, self.strategy, self.client, self.stage = engine, strategy, client, stage
        # on the device for the stage: each step reads them
        self.start = {part: self._on_device(part, global_state[part]) for part in stage.parts}
        self.state: dict[str, SliceState] = {
            part: self._copies(part, client.corrections.get(part, {})) for part in stage.parts
        }
        with torch.no_grad():
            for part in stage.parts:
                strategy.begin_stage(self.start[part], self.state[part], self._copies(part, outer.get(part, {})))

    def _copies(self, part: str, state: SliceState) -> SliceState:
        return {name: self._on_device(part, kept) for name, kept in state.items()}

    def _on_device(self, part: str, tensors: PartState) -> PartState:
        live = self.engine.slices(part)
        return [x.to(y.device, copy=True) for x, y in zip(tensors, live, strict=True)]

    @torch.no_grad()
    def apply(self) -> None:
        """Correct every part that trains. Collective over the slot for ZeRO 1 to 3, as the working weights are renewed."""
        for part in self.stage.parts:
            rate = self.stage.learning_rates[part]
            self.strategy.correct(self.engine.slices(part), self.start[part], self.state[part], learning_rate=rate)
        self.engine.refresh()

    @torch.no_grad()
    def keep(self, num_steps: int | None) -> None:
        """Leave the strategy's state with the client, on the host. num_steps: that counted; None: the update is excluded."""
        for part, state in self.state.items():
            if num_steps is not None:
                rate, live = self.stage.learning_rates[part], self.engine.slices(part)
                self.strategy.end_stage(live, self.start[part], state, learning_rate=rate, num_steps=num_steps)
            self.client.corrections[part] = {name: [x.detach().cpu() for x in kept] for name, kept in state.items()}
