"""MOON (Li et al. 2021, arXiv 2103.16257): embeddings are drawn to the global model's, and away from the client's last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.limits import adapters_are_not
from feddra_ds.strategies.options import StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor

    from feddra_ds.objectives.features import Features


class MoonOptions(StrategyOptions):
    mu: float = Field(1.0, ge=0)
    """μ of the model-contrastive term (the paper tunes it among 0.1, 1, 5 and 10); 0 is fedavg."""
    temperature: float = Field(0.5, gt=0)
    """τ of that term, not of the objective (the paper: 0.5)."""


class Moon(FedAvg):
    """ℓ + μ ℓ_con, ℓ_con = −log(e^{cos(z, z_g)/τ} / (e^{cos(z, z_g)/τ} + e^{cos(z, z_p)/τ})), of the paper's equation (3).

    z, z_g, z_p: a pair's embedding under the model that trains, the global one, and the client's own of the last round that
    it trained in. ℓ_con of images and of texts are added up, as the anchor term's are. In a client's first round, where the
    paper takes z_p = z_g, whose gradient is 0, there is no term.
    """

    Options: ClassVar[type[StrategyOptions]] = MoonOptions
    num_kept: ClassVar[int] = 1

    def problems(self, config: Any) -> list[str]:
        own_last = "the client's own last model, which strategy.name=moon keeps without frozen weights"
        return adapters_are_not(config, ("factors", "product", "freeze_a"), own_last)

    def added_loss(self, features: Features, anchors: Features, previous: Features) -> Tensor:
        import torch.nn.functional as F

        def contrast(z: Tensor, near: Tensor, far: Tensor) -> Tensor:
            gap = F.cosine_similarity(z, far, dim=-1) - F.cosine_similarity(z, near, dim=-1)
            return F.softplus(gap / self.options.temperature)

        sides = zip(features[:2], anchors[:2], previous[:2], strict=True)
        return self.options.mu * sum(contrast(*(x.float() for x in three)) for three in sides)

    @property
    def adds_loss(self) -> bool:
        return bool(self.options.mu > 0)
