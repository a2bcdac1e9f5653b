"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg whose clients are held near the global model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from feddra_ds.strategies.base import SliceState
from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.options import StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor


class FedProxOptions(StrategyOptions):
    mu: float = Field(0.01, ge=0)
    """μ of the proximal term μ/2 ‖w − w_global‖², which every client adds to its loss; 0 is fedavg."""


class FedProx(FedAvg):
    """The local problem F_i(w) + μ/2 ‖w − w_g‖² of the paper's equation (2), by proximal steps.

    Each optimizer step on F_i is followed by w ← argmin ‖v − w‖²/(2 lr) + μ/2 ‖v − w_g‖². Unlike the term's gradient in
    the loss, this is stable at any μ and is not rescaled by Adam.
    """

    Options: ClassVar[type[StrategyOptions]] = FedProxOptions

    def correct(self, live: list[Tensor], start: list[Tensor], state: SliceState, *, learning_rate: float) -> None:
        pull = learning_rate * self.options.mu
        for x, origin in zip(live, start, strict=True):
            x.lerp_(origin, pull / (1 + pull))

    @property
    def corrects(self) -> bool:
        return bool(self.options.mu > 0)
