"""ConVIRT: equation (1) with a weight for each direction.

Zhang, Jiang, Miura, Manning, Langlotz, "Contrastive Learning of Medical Visual Representations from Paired Images and
Text", arXiv 2010.00747, equations (2) to (4).
"""

from __future__ import annotations

from pydantic import Field

from feddra_ds.objectives.alignment import Alignment, AlignmentOptions


class ConvirtOptions(AlignmentOptions):
    """Keys of `convirt`."""

    temperature: float = Field(0.1, gt=0)
    """τ of equations (2) and (3) of the paper (0.1 there), or its initial value when it is learned."""
    image_to_text: float = Field(0.75, ge=0, le=1)
    """λ of the paper's equation (4): the weight of image → text. Text → image has 1 − λ; step_size and anchor_weight are
    rescaled."""


class Convirt(Alignment):
    """ℓ = λ₁ (λ row + (1 − λ) col) + ½ λ₂ ANC: the weights of the directions add up to 1, where `ita`'s add up to 2."""

    Options = ConvirtOptions
    options: ConvirtOptions

    def __init__(self, options: ConvirtOptions):
        self.directions = (options.image_to_text, 1 - options.image_to_text)
        super().__init__(options)
