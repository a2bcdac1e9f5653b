"""DRFA (Deng et al. 2020, arXiv 2102.12660, algorithm 1): AFL whose clients are drawn by p, over many local steps."""

from __future__ import annotations

from typing import Any, ClassVar

from feddra_ds.strategies.afl import AFL
from feddra_ds.strategies.base import Draws
from feddra_ds.strategies.limits import adapters_are_not
from feddra_ds.strategies.mixture_set import Vector


class DRFA(AFL):
    """w ← the mean over the clients as often as each was drawn; p ← the projection of p + η L(w') onto the simplex.

    w': their mean after a random local step of the round, each step as likely as another. The paper takes η = τ γ, and L of
    clients drawn anew, times N/m; here L is measured on all, which has the same mean and less noise. A client that was
    drawn twice trains once and counts twice.
    """

    draws_by_weight: ClassVar[bool] = True
    takes_snapshot: ClassVar[bool] = True

    def average_weight(self, p: Vector, draws: Draws) -> Vector:
        return draws / draws.sum()

    def problems(self, config: Any) -> list[str]:
        out, schedule, dro = [], config.schedule, config.dro
        both_stages = schedule.stage1_steps > 0 and schedule.stage2_steps > 0
        if both_stages and not config.aggregate.after_stage1:
            out.append(
                "aggregate.after_stage1: false averages nothing in stage 1, in which the snapshot of strategy.name=drfa may "
                "lie; use true, or schedule.stage1_steps=0"
            )
        if dro.apply != "aggregate":
            out.append(f"dro.apply: {dro.apply} lets p act twice, as strategy.name=drfa draws by it; use aggregate")
        if dro.evaluate_on == "anchors":
            out.append(
                "dro.evaluate_on: anchors are not of the model that strategy.name=drfa looks at; use train or val"
            )
        if config.aggregate.sparsity is not None:
            out.append(
                "aggregate.sparsity: leaves out most of the snapshot of strategy.name=drfa, and no later one makes up for it; "
                "use null"
            )
        if config.clients.minimum > 1:
            out.append(
                f"clients.minimum: {config.clients.minimum} is more than may train where strategy.name=drfa draws one client "
                "again and again; use 1"
            )
        snapshot = "the snapshot of strategy.name=drfa, which is a mean of factors"
        return out + adapters_are_not(config, ("factors", "freeze_a"), snapshot)
