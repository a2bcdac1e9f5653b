"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): FedAvg whose server moves with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from feddra_ds.strategies.base import Averaged, SliceState, kept
from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.limits import clients_undo_the_step, factors_are_new
from feddra_ds.strategies.options import StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor


class FedAvgMOptions(StrategyOptions):
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """β: the share of the last round's velocity in this round's."""
    server_lr: float = Field(1.0, gt=0)
    """Server's learning rate; 1 with server_momentum = 0 is fedavg."""


class FedAvgM(FedAvg):
    """v ← β v + (mean − w), w ← w + server_lr · v."""

    Options: ClassVar[type[StrategyOptions]] = FedAvgMOptions
    num_outer: ClassVar[int] = 1
    nesterov: ClassVar[bool] = False
    """Whether w follows β v + (mean − w), v being new, instead of v."""

    def problems(self, config: Any) -> list[str]:
        return clients_undo_the_step(config) + factors_are_new(config)

    def server_step(self, old: list[Tensor], mean: list[Tensor], state: SliceState, about: Averaged) -> list[Tensor]:
        momentum, rate = self.options.server_momentum, self.options.server_lr
        new = []
        for v, w, target in zip(kept(state, "velocity", old), old, mean, strict=True):
            change = target - w
            v.mul_(momentum).add_(change)
            new.append(w.add(change.add_(v, alpha=momentum) if self.nesterov else v, alpha=rate))
        return new
