"""The round as data: its stages, their steps, and the learning rate over rounds (ALGORITHM 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from feddra_ds.config.schema import Config, ScheduleConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a round: which part trains, for how many local steps, at which learning rate."""

    name: Literal["stage1", "stage2"]
    num_steps: int
    trains_backbone: bool
    lr: float

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


def stages_of_round(config: Config, round_index: int) -> list[Stage]:
    """The stages of one round, in order; a stage of 0 steps is left out."""
    lr = learning_rate(config.optimizer.lr, config.schedule, round_index)
    both = [
        Stage("stage1", config.schedule.stage1_steps, False, lr),
        Stage("stage2", config.schedule.stage2_steps, True, lr),
    ]
    return [stage for stage in both if stage.num_steps > 0]


def steps_per_round(config: Config) -> int:
    """Local steps of every client in a round."""
    return config.schedule.stage1_steps + config.schedule.stage2_steps
