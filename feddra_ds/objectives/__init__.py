"""Local objectives: embeddings of a batch → losses. One file each; `build` picks by objective.name."""

from __future__ import annotations

from ..config import ObjectiveConfig
from .base import Anchors, Objective
from .ita import ImageTextAlignment

__all__ = ["Anchors", "ImageTextAlignment", "Objective", "build"]


def build(config: ObjectiveConfig) -> Objective:
    """The objective named by objective.name."""
    return {"ita": ImageTextAlignment}[config.name](config)
