"""Local objectives: embeddings of a batch → losses. One file each; `build` picks by objective.name."""

from __future__ import annotations

from feddra_ds.config.schema import ObjectiveConfig
from feddra_ds.objectives.base import Anchors, Objective
from feddra_ds.objectives.ita import ImageTextAlignment

__all__ = ["Anchors", "ImageTextAlignment", "Objective", "build"]


def build(config: ObjectiveConfig) -> Objective:
    """The objective named by objective.name."""
    return {"ita": ImageTextAlignment}[config.name](config)
