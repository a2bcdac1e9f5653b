"""SigLIP: every image and text of the batch is a yes-or-no question of its own.

Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, section 3.2:
    ℓ = −1/B Σ_j Σ_k log σ(z_jk (u_j · v_k / τ + b)),      z_jk = 1 for j = k, else −1.
A pair's share of it is half of its row's and its column's terms.

n: pairs that are looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from feddra_ds import losses
from feddra_ds.common.section import MAY_CHANGE
from feddra_ds.objectives.alignment import fused
from feddra_ds.objectives.base import Learned, Objective
from feddra_ds.objectives.features import Features
from feddra_ds.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class SiglipOptions(ObjectiveOptions):
    """Keys of `siglip`."""

    temperature: float = Field(0.1, gt=0)
    """τ, or its initial value when it is learned (the paper's factor t starts at 10, which is 1/τ)."""
    learnable_temperature: bool = True
    """Train log τ as part of the alignment module."""
    bias: float = -10.0
    """Initial value of b, which is learned as part of the alignment module (the paper: −10)."""
    impl: Literal["auto", "triton", "chunked", "reference"] = Field("auto", json_schema_extra=MAY_CHANGE)
    """Which implementation of the loss runs."""


class Siglip(Objective):
    """ℓ = λ₁ (row + col) / 2 + ½ λ₂ ANC, where rows and columns are sums over the pairs of all the client's ranks."""

    Options = SiglipOptions
    normalises: ClassVar[bool] = True  # in the fused loss
    options: SiglipOptions
    loss_scale = 2.0

    @classmethod
    def learned(cls, options: Any, embedding_dim: int) -> dict[str, Learned]:
        return {"bias": Learned((1,), start=options.bias)}

    def __call__(self, features: Features, anchors: Features | None, group: dist.ProcessGroup | None) -> losses.DroLoss:
        (bias,) = features.learned
        return fused(
            self,
            features,
            anchors,
            bias=bias,
            direction_reduction="mean",
            group=group,
            impl=self.options.impl,
            kind="siglip",
        )

    def per_pair(self, features: Features, text_ids: Tensor) -> Tensor:
        """With the bias that is best for these n pairs; the learned one is that of a training batch's 1 : B − 1."""
        logits = features.image @ features.text.T / float(features.temperature)
        return pair_terms(logits, best_bias(logits))

    def chance(self, batch_size: int) -> float:
        rest = batch_size - 1
        return math.log(batch_size) + (rest * math.log(batch_size / rest) if rest else 0.0)


def pair_terms(logits: Tensor, bias: Tensor | float) -> Tensor:
    """(n,) each pair's half of its row's and its column's terms, from u · v / τ (n, n)."""
    import torch
    from torch.nn.functional import logsigmoid

    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    terms = -logsigmoid(sign * (logits + bias))
    return (terms.sum(0) + terms.sum(1)) / 2


def best_bias(logits: Tensor, num_halvings: int = 60) -> float:
    """The b that makes the loss of `logits` (n, n) least: there Σ σ(logits + b) = n. By bisection, in float64."""
    values, wanted = logits.double(), len(logits)
    reach = float(values.abs().max()) + math.log(max(wanted, 2)) + 1
    low, high = -reach, reach
    if wanted == 1:
        return reach  # one pair and nothing else: every larger one is better
    for _ in range(num_halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if float((values + middle).sigmoid().sum()) > wanted else (middle, high)
    return (low + high) / 2
