"""FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): FedAdam whose second moment changes by steps of bounded size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feddra_ds.strategies.fedadam import FedAdam

if TYPE_CHECKING:
    from torch import Tensor


class FedYogi(FedAdam):
    """v ← v − (1 − β₂) Δ² sign(v − Δ²), all else as in FedAdam: after one large change v falls back slowly, not geometrically."""

    def update_second(self, v: Tensor, square: Tensor) -> None:
        v.addcmul_(square, (v - square).sign_(), value=self.options.beta2 - 1)
