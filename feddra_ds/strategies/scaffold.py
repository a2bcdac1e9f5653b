"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): control variates take out of each local step what is the client's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from feddra_ds.strategies.base import Averaged, SliceState, kept
from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.limits import factors_are_new, factors_rest
from feddra_ds.strategies.options import StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor


class ScaffoldOptions(StrategyOptions):
    server_lr: float = Field(1.0, gt=0)
    """η_g: the server's step towards the clients' mean."""


class Scaffold(FedAvg):
    """Local step: y ← y − lr (g − c_i + c). After K of them c_i ← c_i − c + (x − y)/(K lr), option II of algorithm 1.

    The server's c moves by Σ p_i Δc_i over the clients S that took part. With S = Σ p_i over them and ȳ their mean, that is
    S ((x − ȳ)/(K lr) − c): it needs nothing but the mean. c = Σ p_i c_i then holds as long as p stays, so p must stay.
    With AdamW g is the optimizer's direction, and so are the control variates.
    """

    Options: ClassVar[type[StrategyOptions]] = ScaffoldOptions
    num_outer: ClassVar[int] = 1
    num_kept: ClassVar[int] = 1

    def problems(self, config: Any) -> list[str]:
        schedule, dro = config.schedule, config.dro
        out = factors_are_new(config) + factors_rest(config)
        if schedule.stage1_steps > 0 and schedule.stage2_steps > 0 and schedule.stage2_start == "client":
            out.append(
                "schedule.stage2_start: with client, stage 2 does not begin at the global model, from which "
                "strategy.name=scaffold measures; use global, or schedule.stage1_steps=0"
            )
        stays = dro.fixed_weights is not None or (dro.set != "simplex" and (dro.radius_share or dro.radius) == 0)
        if not stays:
            out.append("dro.radius: the control variates of strategy.name=scaffold need weights p that stay; use 0")
        if dro.apply != "aggregate":
            out.append(
                f"dro.apply: {dro.apply} scales the gradients that strategy.name=scaffold compares; use aggregate"
            )
        return out

    def begin_stage(self, start: list[Tensor], state: SliceState, outer: SliceState) -> None:
        pairs = zip(kept(outer, "control", start), kept(state, "control", start), strict=True)
        state["shift"] = [c - own for c, own in pairs]

    def correct(self, live: list[Tensor], start: list[Tensor], state: SliceState, *, learning_rate: float) -> None:
        for y, shift in zip(live, state["shift"], strict=True):
            y.sub_(shift, alpha=learning_rate)

    def end_stage(
        self, live: list[Tensor], start: list[Tensor], state: SliceState, *, learning_rate: float, num_steps: int
    ) -> None:
        moved = [(x - y) / (num_steps * learning_rate) for x, y in zip(start, live, strict=True)]
        state["control"] = [change - shift for change, shift in zip(moved, state.pop("shift"), strict=True)]

    def server_step(self, old: list[Tensor], mean: list[Tensor], state: SliceState, about: Averaged) -> list[Tensor]:
        new, scale = [], about.num_steps * about.learning_rate
        for c, x, target in zip(kept(state, "control", old), old, mean, strict=True):
            c.lerp_((x - target) / scale, about.share)
            new.append(target.clone() if self.options.server_lr == 1 else x.lerp(target, self.options.server_lr))
        return new
