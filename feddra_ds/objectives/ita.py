"""Image-text alignment with the anchor term: equations (1) to (3)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from feddra_ds.config.schema import ObjectiveConfig
from feddra_ds.losses.fused import fused_dro_loss
from feddra_ds.losses.types import DroLoss
from feddra_ds.objectives.base import Anchors


class ImageTextAlignment:
    """ℓ = λ₁ ITA + λ₂ ANC over the client's ranks, by the fused loss."""

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        self.needs_anchors = config.anchor_weight > 0
        # λ₂ is stated for the sum of the two directions; with their mean the alignment halves, and so must the anchor
        halves = 0.5 if config.direction_reduction == "mean" else 1.0
        self._anchor_weight = halves * config.anchor_weight / config.alignment_weight

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        temperature: Tensor | float,
        anchors: Anchors | None,
        group: dist.ProcessGroup | None,
    ) -> DroLoss:
        loss = fused_dro_loss(
            image,
            text,
            anchors.image if anchors else None,
            anchors.text if anchors else None,
            temperature=temperature,
            anchor_weight=self._anchor_weight if anchors else 0.0,
            direction_reduction=self.config.direction_reduction,
            group=group,
            impl=self.config.impl,
        )
        return loss._replace(total=self.config.alignment_weight * loss.total)
