"""The keys that every objective has: the config's section `objective`. An objective adds its own in its class."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from feddra_ds.common.section import MAY_CHANGE, Section


class ObjectiveOptions(Section):
    """Equation (3) and what it needs of the model."""

    name: str = "ita"
    """Local objective: ita (image-text alignment, equation (1)) or another of docs/objectives.md, or package.module:Class
    for your own. Its options join these."""
    temperature: float = Field(0.07, gt=0)
    """τ of equation (1), or its initial value when it is learned."""
    learnable_temperature: bool = False
    """Train log τ as part of the alignment module."""
    alignment_weight: float = Field(1.0, gt=0)
    """λ₁ of equation (3)."""
    anchor_weight: float = Field(1.0, ge=0)
    """λ₂ of equation (3), stated for the sum of the two directions; 0 computes no anchors."""
    anchor_reduction: Literal["mean", "sum"] = "mean"
    """Equation (2) as the mean over the embedding's D dimensions (the release), or as their sum, which is D times as strong.
    With mean and λ₂ = 1 it hardly pulls: see anchor_gradient_ratio in metrics.jsonl."""
    anchor_mode: Literal["eval", "train"] = "eval"
    """Mode of the global model when it embeds anchors. train, the release's, takes a batchnorm's statistics from the batch."""
    anchors: Literal["replay", "resident"] = Field("replay", json_schema_extra=MAY_CHANGE)
    """Stage 2's anchors: replay computes them before the first step, resident keeps a frozen copy of the model."""
