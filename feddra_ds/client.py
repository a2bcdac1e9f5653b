"""A client's local training: restore, anchors, steps (ALGORITHM 6). Runs on every rank of the client's slot."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .aggregate import validate_update
from .config import Config
from .data.order import Position
from .data.pipeline import Batch, ClientData
from .engine import Engine, PartState
from .logs import logger
from .objectives import Anchors, Objective
from .schedule import Stage
from .topology import Topology


@dataclass
class Client:
    """A data owner: its data, where it stands in them, and what it carries from one stage to the next."""

    index: int
    id: str
    data: ClientData
    position: Position = field(default_factory=lambda: Position(0, 0))
    aligner: PartState | None = None  # its own θ_i between stage 1 and stage 2, on the host


@dataclass(frozen=True)
class LocalResult:
    """What a stage gave: the mean training loss over its steps, the pairs trained on, and why not to average it."""

    mean_loss: float
    num_pairs: int
    problem: str | None


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
        anchors = self._anchor_source(client, stage)
        if stage.trains_backbone and client.aligner is not None:
            engine.write({"aligner": client.aligner})
        client.aligner = None
        engine.reset_optimizer()
        engine.set_learning_rates(stage.learning_rates)
        engine.train()
        loss_sum, num_good, in_a_row, worst_run = 0.0, 0, 0, 0
        for step, batch in enumerate(client.data.batches(client.position, stage.num_steps)):
            out = engine(**model_inputs(batch, engine), freeze_backbone=not stage.trains_backbone, return_hidden=True)
            losses = self.objective(
                out.image_embeds, out.text_embeds, out.temperature, anchors(step, batch, out.hidden), self.group
            )
            value = float(losses.total.detach())  # equal on every rank, so all of them skip or none
            if math.isfinite(value):
                engine.backward(loss_weight * losses.total)
                engine.step()
                loss_sum, num_good, in_a_row = loss_sum + value, num_good + 1, 0
            else:
                in_a_row += 1
                worst_run = max(worst_run, in_a_row)
                logger.warning("client %s: step %d of %s skipped, its loss is %s", client.id, step, stage.name, value)
            if on_step is not None:
                on_step(step, value)
        client.position = client.data.advance(client.position, stage.num_steps)
        if not stage.trains_backbone:
            client.aligner = engine.snapshot("aligner") if self._continues_own_aligner else None
        problem = validate_update(engine, self.topology, stage.parts)
        if worst_run >= self.config.optimizer.max_skipped_steps:
            problem = f"{worst_run} steps in a row had a non-finite loss (optimizer.max_skipped_steps)"
        mean_loss = loss_sum / num_good if num_good else float("nan")
        return LocalResult(mean_loss, num_good * self.config.data.batch_size, problem)

    @property
    def _continues_own_aligner(self) -> bool:
        return self.config.schedule.stage2_start == "client" and self.config.schedule.stage2_steps > 0

    def _anchor_source(self, client: Client, stage: Stage) -> Callable[[int, Batch, Tensor], Anchors | None]:
        """Where the stage's anchors come from; called while the engine holds the global model."""
        if not self.objective.needs_anchors:
            return lambda step, batch, hidden: None
        if not stage.trains_backbone:
            # φ_i = φ_g for the whole stage: the client's backbone pass serves the anchors too
            self.engine.copy_part(self.engine.module.get_submodule("aligner"), self.frozen_aligner)
            return lambda step, batch, hidden: self._embed(self.frozen_aligner, hidden)
        if self.config.objective.anchors == "resident":
            assert self.frozen_model is not None
            model = self.frozen_model
            self.engine.copy_part(self.engine.module, model)

            def resident(step: int, batch: Batch, hidden: Tensor) -> Anchors:
                with torch.no_grad():
                    out = model(**model_inputs(batch, self.engine))
                return Anchors(out.image_embeds, out.text_embeds)

            return resident
        stored = list(self._replay(client, stage))
        return lambda step, batch, hidden: stored[step]

    def _replay(self, client: Client, stage: Stage) -> Iterator[Anchors]:
        """The anchors of the stage's batches, computed before its first step, while the live weights equal (φ_g, θ_g)."""
        self.engine.train(False)
        for batch in client.data.batches(client.position, stage.num_steps):
            with torch.no_grad():
                out = self.engine(**model_inputs(batch, self.engine))
            yield Anchors(out.image_embeds, out.text_embeds)

    @torch.no_grad()
    def _embed(self, aligner: nn.Module, hidden: Tensor) -> Anchors:
        image, text = aligner(hidden)
        return Anchors(image, text)


def model_inputs(batch: Batch, engine: Engine) -> dict[str, Tensor]:
    """The tensors of a batch that the model takes, on the engine's device and in its dtype."""
    moved = batch.to(engine.device)
    return {
        "pixel_values": moved.pixel_values.to(engine.dtype),
        "input_ids": moved.input_ids,
        "attention_mask": moved.attention_mask,
    }


def frozen_twin(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy without gradients, in eval mode, in the forward's dtype; made before DeepSpeed partitions the module."""
    return copy.deepcopy(module).requires_grad_(False).eval().to(device=device, dtype=dtype)
