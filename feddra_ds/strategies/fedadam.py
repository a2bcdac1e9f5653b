"""FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): FedAvg whose server takes Adam's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from feddra_ds.strategies.base import Averaged, SliceState, kept
from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.limits import clients_undo_the_step, factors_are_new
from feddra_ds.strategies.options import StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor


class FedAdamOptions(StrategyOptions):
    server_lr: float = Field(1e-3, gt=0)
    """η: no weight moves by more than about this in a round. As large as tau, a small change is followed as it is."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """β₁, of the mean change."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """β₂, of its square."""
    tau: float = Field(1e-3, gt=0)
    """τ: changes far below it are not scaled up; the second moment starts at τ²."""


class FedAdam(FedAvg):
    """Δ = mean − w, m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², w ← w + η m / (√v + τ); no bias correction, v₋₁ = τ²."""

    Options: ClassVar[type[StrategyOptions]] = FedAdamOptions
    num_outer: ClassVar[int] = 2

    def problems(self, config: Any) -> list[str]:
        return clients_undo_the_step(config) + factors_are_new(config)

    def server_step(self, old: list[Tensor], mean: list[Tensor], state: SliceState, about: Averaged) -> list[Tensor]:
        o = self.options
        first, second = kept(state, "first", old), kept(state, "second", old, value=o.tau**2)
        new = []
        for m, v, w, target in zip(first, second, old, mean, strict=True):
            change = target - w
            m.lerp_(change, 1 - o.beta1)
            self.update_second(v, change.square_())
            new.append(w.addcdiv(m, v.sqrt().add_(o.tau), value=o.server_lr))
        return new

    def update_second(self, v: Tensor, square: Tensor) -> None:
        """v ← the next second moment, in place, from Δ²."""
        v.lerp_(square, 1 - self.options.beta2)
