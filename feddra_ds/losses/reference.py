"""Equations (1)-(3) in plain lines: the specification that tests and benchmarks compare with. Holds B×B matrices.

Shape letters: B pairs, D embedding dimensions.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from feddra_ds.losses.types import DroLoss, Duplicates, Kind, Reduction

EPS = 1e-12  # smallest norm that an embedding is divided by


def normalize(x: Tensor) -> Tensor:
    """Rows of `x` (B, D) at unit length, in float32 (float64 stays)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=EPS)


def direction_weights(reduction: Reduction | tuple[float, float]) -> tuple[float, float]:
    """The weights of image → text and text → image. Raises ValueError for what is neither a Reduction nor two weights."""
    if isinstance(reduction, tuple) and len(reduction) == 2:
        if min(reduction) >= 0 and 0 < sum(reduction) < math.inf:
            return reduction
    elif reduction in get_args(Reduction):
        return (1.0, 1.0) if reduction == "sum" else (0.5, 0.5)
    known = ", ".join(get_args(Reduction))
    raise ValueError(f"direction_reduction must be one of {known}, or two weights ≥ 0, not {reduction!r}")


def reference_loss(
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    sample_weight: Tensor | None,
    temperature: Tensor | float,
    bias: Tensor | float = 0.0,
    anchor_weight: float = 0.0,
    direction_reduction: Reduction | tuple[float, float] = "sum",
    kind: Kind = "ita",
    text_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
) -> DroLoss:
    """`fused_dro_loss` of one process, by autograd; `total` alone keeps its graph."""
    u, v = normalize(image), normalize(text)
    logits = u @ v.T / temperature
    if kind == "ita":
        row, col = both_directions(logits, text_ids, duplicates)
    else:
        z = 2 * torch.eye(len(u), dtype=u.dtype, device=u.device) - 1
        pair = -F.logsigmoid(z * (logits + bias))
        row, col = pair.sum(1), pair.sum(0)
    to_text, to_image = direction_weights(direction_reduction)
    alignment = to_text * row + to_image * col
    anchor = torch.zeros_like(alignment)
    if image_anchor is not None and text_anchor is not None:
        anchor = (u - normalize(image_anchor)).square().mean(1) + (v - normalize(text_anchor)).square().mean(1)
    per_sample = alignment + anchor_weight * anchor
    w = torch.ones_like(per_sample) if sample_weight is None else sample_weight.to(per_sample.dtype)
    return DroLoss((w * per_sample).sum() / w.sum(), per_sample.detach(), alignment.detach(), anchor.detach())


def both_directions(logits: Tensor, text_ids: Tensor | None, duplicates: Duplicates) -> tuple[Tensor, Tensor]:
    """The two terms of equation (1), (B,) each, from S (B, B). Pairs of equal `text_ids` (B,) have the same report:

    negative   row_j = −S_jj + logsumexp_k S_jk, as if they had not
    positive   row_j = −logsumexp_(k: id_k = id_j) S_jk + logsumexp_k S_jk: they are positives of each other
    ignore     row_j = −S_jj + logsumexp_(k: k = j or id_k ≠ id_j) S_jk: they are left out of each other's sums
    columns likewise. Without repeated reports the three are equal.
    """
    against = logits
    if duplicates != "negative":
        assert text_ids is not None
        same = text_ids[:, None] == text_ids[None, :]
        if duplicates == "positive":
            own = logits.masked_fill(~same, -torch.inf)
            return logits.logsumexp(1) - own.logsumexp(1), logits.logsumexp(0) - own.logsumexp(0)
        against = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device), -torch.inf)
    return against.logsumexp(1) - logits.diagonal(), against.logsumexp(0) - logits.diagonal()


@torch.no_grad()
def alignment_per_pair(
    image: Tensor,
    text: Tensor,
    text_ids: Tensor,
    temperature: float,
    direction_reduction: Reduction | tuple[float, float] = "sum",
    duplicates: Duplicates = "negative",
) -> Tensor:
    """Equation (1) per pair, (B,), for the losses L_i of equation (4). `duplicates`: see both_directions.

    No gradient; holds B×B matrices, for evaluation batches. Raises ValueError when `text_ids` is not one id a pair.
    """
    if text_ids.shape != (len(image),):
        raise ValueError(f"text_ids must be one id for each of the {len(image)} pairs, not {tuple(text_ids.shape)}")
    logits = normalize(image) @ normalize(text).T / temperature
    row, col = both_directions(logits, text_ids, duplicates)
    to_text, to_image = direction_weights(direction_reduction)
    return to_text * row + to_image * col
