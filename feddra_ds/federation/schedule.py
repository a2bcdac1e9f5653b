"""The round as data: its stages, their steps, what each trains and hands on, and the learning rate over rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from feddra_ds.config.schema import Config, ScheduleConfig
from feddra_ds.data.loading.order import permutation, uniform
from feddra_ds.model import lora_options
from feddra_ds.model.lora_options import FactorName
from feddra_ds.strategies.base import Draws
from feddra_ds.strategies.mixture_set import Vector


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
    ends_round: bool = False
    """Whether it is the round's last."""
    snapshot: int | None = None
    """After so many of its steps the clients' weights are kept aside too, and averaged (Strategy.takes_snapshot)."""
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


def stages_of_round(
    config: Config, round_index: int, step_factor: int = 1, *, takes_snapshot: bool = False
) -> list[Stage]:
    """The stages of one round, in order; a stage of 0 steps is left out.

    step_factor: how many times the schedule's steps each stage has (Strategy.step_factor). takes_snapshot: one of them has
    a snapshot, after any step of the round as likely as after another, drawn by run.seed.
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
        ends_round=schedule.stage2_steps == 0,
    )
    stage2 = Stage(
        "stage2",
        step_factor * schedule.stage2_steps,
        lr,
        trains_backbone=True,
        averages=True,
        hands_on_aligner=False,
        moves_mixture=False,
        ends_round=True,
        round_index=round_index,
        resting_factor=_resting_factor(config, round_index),
    )
    stages = [stage for stage in (stage1, stage2) if stage.num_steps > 0]
    if not takes_snapshot:
        return stages
    num_steps = sum(stage.num_steps for stage in stages)
    left = 1 + int(permutation(num_steps, "snapshot of a round", config.run.seed, round_index)[0])
    for i, stage in enumerate(stages):
        if 0 < left <= stage.num_steps:
            stages[i] = replace(stage, snapshot=left)
        left -= stage.num_steps
    return stages


def _resting_factor(config: Config, round_index: int) -> FactorName | None:
    """B is 0 at first, where A has no gradient: so B begins."""
    adapter = lora_options.parse(config.model.adapter)
    if adapter is None or adapter.aggregation != "alternate":
        return None
    return "a" if round_index % 2 == 0 else "b"


def draws_of_round(config: Config, round_index: int, p: Vector, *, by_weight: bool = False) -> Draws:
    """How often each client is drawn for a round, (N,); those of 0 do not train. A function of run.seed, round and p.

    All clients once, or clients.per_round of them, each as likely as another. by_weight (Strategy.draws_by_weight): so
    many draws, of N where it is null, each by p whatever came before it.
    """
    num_clients, num_draws = len(p), config.clients.per_round
    seed = ("clients of a round", config.run.seed, round_index)
    if by_weight:
        up_to = np.cumsum(p)
        where = uniform(num_draws or num_clients, *seed) * up_to[-1]
        return np.bincount(np.searchsorted(up_to, where, side="right"), minlength=num_clients)
    drawn = np.zeros(num_clients, dtype=np.int64)
    drawn[permutation(num_clients, *seed)[:num_draws]] = 1
    return drawn


def steps_per_round(config: Config, step_factor: int = 1) -> int:
    """Local steps of every client in a round."""
    return step_factor * (config.schedule.stage1_steps + config.schedule.stage2_steps)
