"""A client's local training: restore, anchors, steps (ALGORITHM 6). Runs on every rank of the client's slot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from feddra_ds.common.logs import logger
from feddra_ds.common.text import listed
from feddra_ds.config.schema import Config
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position
from feddra_ds.distributed.collectives import gather_uneven
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, PartState
from feddra_ds.federation.aggregation.admission import validate_update
from feddra_ds.federation.schedule import Stage
from feddra_ds.federation.step import AnchorSource, LocalStep, model_inputs
from feddra_ds.losses.reference import alignment_with_positives
from feddra_ds.objectives.base import Anchors, Objective


@dataclass
class Client:
    """A data owner: its data, where it stands in them, and what it carries from one stage to the next."""

    index: int
    id: str
    data: ClientData
    position: Position = field(default_factory=lambda: Position(0, 0))
    aligner: dict[str, PartState] | None = None  # its own θ_i (and buffers) after stage 1, on the host


@dataclass(frozen=True)
class LocalResult:
    """What a stage gave.

    mean_loss: of its steps; num_pairs: pairs trained on; problem: why not to average it, or None; anchor_loss: L_i of
    the model that the stage started from, where dro.evaluate_on = anchors reads it off.
    """

    mean_loss: float
    num_pairs: int
    problem: str | None
    anchor_loss: float | None = None

    def report(self) -> dict[str, Any]:
        """What the coordinator is told, JSON-ready: a loss that is not finite is null."""
        return {
            "problem": self.problem,
            "loss": self.anchor_loss,
            "train_loss": self.mean_loss if math.isfinite(self.mean_loss) else None,
            "pairs": self.num_pairs,
        }


class LocalTrainer:
    """Trains any client of a slot on the slot's one engine, stage by stage."""

    def __init__(
        self,
        engine: Engine,
        frozen_aligner: nn.Module,
        frozen_model: nn.Module | None,
        objective: Objective,
        config: Config,
        topology: Topology,
    ):
        self.engine, self.objective, self.config, self.topology = engine, objective, config, topology
        self.frozen_aligner = frozen_aligner  # holds θ_g in stage 1, beside the live θ_i on the same backbone pass
        self.frozen_model = frozen_model  # holds (φ_g, θ_g) in stage 2 where objective.anchors is resident
        self.group = topology.slot_group if topology.plan.ranks_per_slot > 1 else None
        self.step = LocalStep(engine, objective, self.group, config.data.micro_batch_size)

    def run_stage(
        self,
        client: Client,
        stage: Stage,
        global_state: dict[str, PartState],
        loss_weight: float,
        on_step: Callable[[int, float], None] | None = None,
    ) -> LocalResult:
        """Train one client for one stage; the engine holds its weights afterwards.

        global_state: this rank's slices of (φ_g, θ_g); loss_weight: factor of the whole loss (N p_i where dro.apply
        says so, else 1). Collective over the slot.
        """
        engine = self.engine
        engine.write(global_state)
        batches, anchors_of = self._prepare(client, stage)
        if stage.trains_backbone and client.aligner is not None:
            engine.write(client.aligner)
        client.aligner = None
        engine.reset_optimizer()
        engine.set_learning_rates(stage.learning_rates)
        engine.train()
        reads_losses = self.config.dro.evaluate_on == "anchors" and not stage.trains_backbone
        loss_sum, num_good, in_a_row, worst_run = 0.0, 0, 0, 0
        skipped: list[int] = []
        anchor_losses: list[Tensor] = []
        for step, batch in enumerate(batches):
            value = self.step(batch, anchors_of(step), train_backbone=stage.trains_backbone, weight=loss_weight)
            if reads_losses:
                anchor_losses.append(self._anchor_losses(batch))
            if math.isfinite(value):
                loss_sum, num_good, in_a_row = loss_sum + value, num_good + 1, 0
            else:
                in_a_row += 1
                worst_run = max(worst_run, in_a_row)
                skipped.append(step)
            if on_step is not None:
                on_step(step, value)
        if skipped:
            steps = listed([str(step) for step in skipped])
            logger.warning("client %s: %s skipped %d of %d steps, whose loss was not finite: %s",
                           client.id, stage.name, len(skipped), stage.num_steps, steps)  # fmt: skip
        client.position = client.data.advance(client.position, stage.num_steps)
        problem = validate_update(engine, self.topology, stage.parts)
        if worst_run >= self.config.optimizer.max_skipped_steps:
            problem = f"{worst_run} steps in a row had a non-finite loss (optimizer.max_skipped_steps)"
        if not stage.trains_backbone and problem is None and (self._continues_own_aligner or reads_losses):
            client.aligner = {part: engine.snapshot(part) for part in ("aligner", BUFFERS)}
        mean_loss = loss_sum / num_good if num_good else float("nan")
        anchor_loss = float(torch.cat(anchor_losses).double().mean()) if anchor_losses else None
        return LocalResult(mean_loss, num_good * self.config.data.batch_size, problem, anchor_loss)

    @property
    def _continues_own_aligner(self) -> bool:
        return self.config.schedule.stage2_start == "client" and self.config.schedule.stage2_steps > 0

    def _prepare(self, client: Client, stage: Stage) -> tuple[Iterable[Batch], Callable[[int], AnchorSource]]:
        """The stage's batches, and by step where their anchors come from; called while the engine holds the global model."""
        fresh = client.data.batches(client.position, stage.num_steps)
        if not self.objective.needs_anchors:
            return fresh, lambda step: lambda rows, batch, hidden: None
        if not stage.trains_backbone:
            # φ_i = φ_g for the whole stage: the client's backbone pass serves the anchors too
            self.engine.copy_part(self.engine.module.get_submodule("aligner"), self.frozen_aligner)
            return fresh, lambda step: lambda rows, batch, hidden: self._align_frozen(hidden)
        if self.config.objective.anchors == "resident":
            assert self.frozen_model is not None
            self.engine.copy_part(self.engine.module, self.frozen_model)
            return fresh, lambda step: lambda rows, batch, hidden: self._embed(self.frozen_model, batch)
        kept, stored = self._replay(client, stage)
        batches = fresh if kept is None else kept
        return (
            batches,
            lambda step: lambda rows, batch, hidden: Anchors(stored[step].image[rows], stored[step].text[rows]),
        )

    def _replay(self, client: Client, stage: Stage) -> tuple[list[Batch] | None, list[Anchors]]:
        """The anchors of the stage's batches, computed before its first step, while the live weights equal (φ_g, θ_g).

        The decoded batches (uint8) are kept too, up to data.replay_cache_bytes; beyond, they are decoded twice.
        """
        self.engine.train(False)
        size = self.config.data.micro_batch_size
        kept: list[Batch] | None = []
        stored, room = [], self.config.data.replay_cache_bytes
        for batch in client.data.batches(client.position, stage.num_steps):
            step = size or len(batch)
            parts = [self._embed(self.engine, batch[i : i + step]) for i in range(0, len(batch), step)]
            stored.append(Anchors(torch.cat([p.image for p in parts]), torch.cat([p.text for p in parts])))
            room -= batch.pixels.nbytes
            if kept is not None:
                kept.append(batch)
            if room < 0:
                kept = None
        return kept, stored

    @torch.no_grad()
    def _align_frozen(self, hidden: Any) -> Anchors:
        return Anchors(*self.frozen_aligner(hidden))

    @torch.no_grad()
    def _embed(self, model: Any, batch: Batch) -> Anchors:
        out = model(**model_inputs(batch, self.engine))
        return Anchors(out.image_embeds, out.text_embeds)

    def _anchor_losses(self, batch: Batch) -> Tensor:
        """Per-pair alignment losses of the global model on this batch, from the anchors that the step has just used.

        In batches of dro.evaluation_batch_size over the whole of the client's batch: (pairs,) fp32, equal on every rank.
        """
        anchors = self.step.last_anchors
        assert anchors is not None
        image, text, ids = (gather_uneven(x, self.group) for x in (*anchors, batch.text_ids.to(anchors.image.device)))
        size = self.config.dro.evaluation_batch_size
        losses = [
            alignment_with_positives(
                nn.functional.normalize(image[i : i + size].float(), dim=-1),
                nn.functional.normalize(text[i : i + size].float(), dim=-1),
                ids[i : i + size],
                float(self.frozen_aligner.get_submodule("temperature")()),
                self.config.objective.direction_reduction,
            )
            for i in range(0, len(ids) // size * size, size)
        ]
        return torch.cat(losses).cpu()
