"""What the objectives with equation (1) at their core share: the fused loss, its anchor term, L_i and its chance level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from feddra_ds import losses
from feddra_ds.common.section import MAY_CHANGE
from feddra_ds.objectives.base import Objective
from feddra_ds.objectives.features import Features
from feddra_ds.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class AlignmentOptions(ObjectiveOptions):
    """Keys of the fused loss."""

    duplicates: Literal["negative", "positive", "ignore"] = "negative"
    """What another pair of the batch with the same report is to a pair, in training and in the losses L_i alike: a negative
    (the release), a positive, or left out."""
    impl: Literal["auto", "triton", "chunked", "reference"] = Field("auto", json_schema_extra=MAY_CHANGE)
    """Which implementation of the loss runs. triton knows duplicates = negative only; for the others auto takes chunked."""
    bf16_products: bool = False
    """Give the loss of a local step the heads' bf16 outputs, so that triton multiplies them on 16-bit tensor cores; false gives
    it fp32 embeddings of unit length. Losses stay exact to fp32, gradients get a second rounding to bf16 (docs/kernels.md)."""

    @field_validator("impl")
    @classmethod
    def _knows_duplicates(cls, value: str, info: ValidationInfo) -> str:
        duplicates = info.data.get("duplicates", "negative")
        if value == "triton" and duplicates != "negative":
            raise ValueError(
                f"triton knows objective.duplicates = negative only, not {duplicates}; must be auto or chunked"
            )
        return value


def fused(objective: Objective, features: Features, anchors: Features | None, **how: Any) -> losses.DroLoss:
    """The fused loss of λ₁ times what `how` names (losses.fused_dro_loss) + λ₂ ANC, by the objective's options."""
    options = objective.options
    # the fused loss takes the mean over the dimensions
    anchor_scale = features.image.shape[1] if options.anchor_reduction == "sum" else 1
    # λ₂ is stated for the sum of the two directions; where the alignment is smaller, so must the anchor be
    anchor_weight = options.anchor_weight / options.alignment_weight / objective.loss_scale
    loss = losses.fused_dro_loss(
        features.image,
        features.text,
        anchors.image if anchors else None,
        anchors.text if anchors else None,
        temperature=features.temperature,
        anchor_weight=anchor_weight * anchor_scale if anchors else 0.0,
        **how,
    )
    return loss._replace(total=options.alignment_weight * loss.total, anchor=anchor_scale * loss.anchor)


class Alignment(Objective):
    """ℓ = λ₁ ITA + λ₂ ANC over the client's ranks, with a weight for each direction of ITA."""

    Options = AlignmentOptions
    normalises: ClassVar[bool] = True  # in the fused loss
    options: AlignmentOptions
    directions: tuple[float, float] = (1.0, 1.0)
    """Weights of image → text and text → image."""

    def __init__(self, options: AlignmentOptions):
        super().__init__(options)
        self.takes_head_outputs = options.bf16_products
        self.loss_scale = 2.0 / sum(self.directions)

    def __call__(self, features: Features, anchors: Features | None, group: dist.ProcessGroup | None) -> losses.DroLoss:
        return fused(
            self,
            features,
            anchors,
            direction_reduction=self.directions,
            group=group,
            impl=self.options.impl,
            text_ids=features.text_ids,
            duplicates=self.options.duplicates,
        )

    def per_pair(self, features: Features, text_ids: Tensor) -> Tensor:
        return losses.alignment_per_pair(
            features.image,
            features.text,
            text_ids,
            float(features.temperature),
            self.directions,
            self.options.duplicates,
        )

    def chance(self, batch_size: int) -> float:
        return sum(self.directions) * math.log(batch_size)
