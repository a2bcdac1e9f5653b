"""Local objectives: features of a batch → loss, L_i and its chance level; one file and one row each, loaded on demand."""

from __future__ import annotations

from feddra_ds.common.plugins import find_class
from feddra_ds.objectives.base import Learned, Objective
from feddra_ds.objectives.features import Features
from feddra_ds.objectives.options import ObjectiveOptions

__all__ = ["OBJECTIVES", "Features", "Learned", "Objective", "ObjectiveOptions", "build", "find"]

OBJECTIVES = {
    "ita": "feddra_ds.objectives.ita:ImageTextAlignment",
    "convirt": "feddra_ds.objectives.convirt:Convirt",
    "siglip": "feddra_ds.objectives.siglip:Siglip",
    "gloria": "feddra_ds.objectives.gloria:Gloria",
    "mgca": "feddra_ds.objectives.mgca:Mgca",
    "gcl": "feddra_ds.objectives.gcl:Gcl",
}


def find(name: object) -> type[Objective]:
    """The class that objective.name names. Raises ConfigError."""
    return find_class("objective.name", name, OBJECTIVES, Objective)  # type: ignore[type-abstract]


def build(options: ObjectiveOptions) -> Objective:
    """The objective of a config's section `objective`."""
    return find(options.name)(options)
