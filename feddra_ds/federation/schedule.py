"""The round as data: its stages, their steps, what each trains and hands on, and the learning rate over rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from feddra_ds.config.schema import Config, ScheduleConfig
from feddra_ds.data.loading.order import permutation
from feddra_ds.model import lora_options
from feddra_ds.model.lora_options import FactorName


@dataclass(frozen=True)
class Stage:
    """One stage of a round, with everything that depends on which stage it is."""

    name: Literal["stage1", "stage2"]
    num_steps: int
    lr: float
    trains_backbone: bool
    averages: bool
    """Whether the clients' models are averaged after it; else they go on, each with its own aligner."""
    hands_on_aligner: bool
    """Whether the next stage starts from the client's own aligner."""
    moves_mixture: bool
    """Whether the weights p move before its average, by losses read off its anchors (dro.evaluate_on = anchors)."""
    round_index: int = 0
    resting_factor: FactorName | None = None
    """The factor of the adapters that does not train in it, and so is not averaged after it."""

    @property
    def keeps_aligner(self) -> bool:
        """Whether a client's aligner is kept after it: for the next stage, or to be averaged once p has moved."""
        return self.hands_on_aligner or self.moves_mixture

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model that train, and so are averaged after the stage."""
        return ("aligner", "backbone") if self.trains_backbone else ("aligner",)

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"aligner": self.lr, "backbone": self.lr if self.trains_backbone else 0.0}


def learning_rate(peak: float, schedule: ScheduleConfig, round_index: int) -> float:
    """Learning rate of a round: linear warm-up to `peak`, then constant, cosine or linear decay to min_lr_fraction."""
    warmup = schedule.warmup_rounds
    if round_index < warmup:
        return peak * (round_index + 1) / (warmup + 1)
    if schedule.decay == "constant":
        return peak
    progress = (round_index - warmup) / max(1, schedule.rounds - warmup)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1 - progress
    return peak * (schedule.min_lr_fraction + (1 - schedule.min_lr_fraction) * remaining)


def stages_of_round(config: Config, round_index: int, step_factor: int = 1) -> list[Stage]:
    """The stages of one round, in order; a stage of 0 steps is left out.

    step_factor: how many times the schedule's steps each stage has (Strategy.step_factor).
    """
    schedule = config.schedule
    lr = learning_rate(config.optimizer.lr, schedule, round_index)
    reads_losses = config.dro.evaluate_on == "anchors"
    stage1 = Stage(
        "stage1",
        step_factor * schedule.stage1_steps,
        lr,
        trains_backbone=False,
        averages=config.aggregate.after_stage1 or schedule.stage2_steps == 0,
        hands_on_aligner=schedule.stage2_start == "client" and schedule.stage2_steps > 0,
        moves_mixture=reads_losses,
    )
    stage2 = Stage(
        "stage2",
        step_factor * schedule.stage2_steps,
        lr,
        trains_backbone=True,
        averages=True,
        hands_on_aligner=False,
        moves_mixture=False,
        round_index=round_index,
        resting_factor=_resting_factor(config, round_index),
    )
    return [stage for stage in (stage1, stage2) if stage.num_steps > 0]


def _resting_factor(config: Config, round_index: int) -> FactorName | None:
    """B is 0 at first, where A has no gradient: so B begins."""
    adapter = lora_options.parse(config.model.adapter)
    if adapter is None or adapter.aggregation != "alternate":
        return None
    return "a" if round_index % 2 == 0 else "b"


def clients_of_round(config: Config, round_index: int, num_clients: int) -> list[int]:
    """Indices of the clients that train in a round, rising: all, or clients.per_round of them, each as likely as another."""
    if config.clients.per_round is None:
        return list(range(num_clients))
    drawn = permutation(num_clients, "clients of a round", config.run.seed, round_index)
    return sorted(drawn[: config.clients.per_round].tolist())


def steps_per_round(config: Config, step_factor: int = 1) -> int:
    """Local steps of every client in a round."""
    return step_factor * (config.schedule.stage1_steps + config.schedule.stage2_steps)
