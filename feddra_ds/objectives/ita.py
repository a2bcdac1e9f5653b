"""Image-text alignment with the anchor term: equations (1) to (3), by the fused loss."""

from __future__ import annotations

from typing import Literal

from feddra_ds.objectives.alignment import Alignment, AlignmentOptions


class ItaOptions(AlignmentOptions):
    """Keys of `ita`."""

    direction_reduction: Literal["sum", "mean"] = "sum"
    """Sum (the release) or mean (the CLIP habit) of the two directions; step_size and anchor_weight are rescaled."""


class ImageTextAlignment(Alignment):
    """ℓ = λ₁ ITA + λ₂ ANC over the client's ranks."""

    Options = ItaOptions
    options: ItaOptions

    def __init__(self, options: ItaOptions):
        self.directions = (0.5, 0.5) if options.direction_reduction == "mean" else (1.0, 1.0)
        super().__init__(options)
