"""What the losses take and give."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["ita", "siglip"]
Reduction = Literal["sum", "mean"]
Impl = Literal["auto", "triton", "chunked", "reference"]
Exchange = Literal["auto", "gather", "ring"]
Duplicates = Literal["negative", "positive", "ignore"]


class Same(NamedTuple):
    """Which pairs of a block have the same report: those of equal id."""

    rows: Tensor
    """(M,) int64."""
    columns: Tensor
    """(N,) int64."""
    positive: bool
    """Whether they are positives of each other; else they are left out of each other's denominators."""


class DroLoss(NamedTuple):
    """Equation (3) on a batch of B pairs per rank; float32, or float64 where the embeddings are."""

    total: Tensor
    """Scalar Σ w_j per_sample_j / Σ w_j over the whole group, the same on each rank; carries the gradient."""
    per_sample: Tensor
    """(B,) alignment + anchor_weight · anchor of this rank's pairs, detached."""
    alignment: Tensor
    """(B,) equation (1), detached."""
    anchor: Tensor
    """(B,) equation (2), detached; zeros without anchors."""
