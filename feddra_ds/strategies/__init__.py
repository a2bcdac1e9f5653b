"""Federated algorithms: presets, the weights p, hooks on slices; a file and a row each, loaded on demand. They know no ranks."""

from __future__ import annotations

from feddra_ds.common.plugins import find_class
from feddra_ds.strategies.base import Strategy
from feddra_ds.strategies.options import DroOptions, StrategyOptions

__all__ = ["STRATEGIES", "DroOptions", "Strategy", "StrategyOptions", "build", "find"]

STRATEGIES = {
    "feddra": "feddra_ds.strategies.feddra:FedDRA",
    "fedavg": "feddra_ds.strategies.fedavg:FedAvg",
    "fedprox": "feddra_ds.strategies.fedprox:FedProx",
    "moon": "feddra_ds.strategies.moon:Moon",
    "fedavgm": "feddra_ds.strategies.fedavgm:FedAvgM",
    "fedadam": "feddra_ds.strategies.fedadam:FedAdam",
    "fedyogi": "feddra_ds.strategies.fedyogi:FedYogi",
    "diloco": "feddra_ds.strategies.diloco:DiLoCo",
    "scaffold": "feddra_ds.strategies.scaffold:Scaffold",
    "qffl": "feddra_ds.strategies.qffl:QFFL",
    "afl": "feddra_ds.strategies.afl:AFL",
    "drfa": "feddra_ds.strategies.drfa:DRFA",
    "local": "feddra_ds.strategies.local:Local",
    "centralized": "feddra_ds.strategies.centralized:Centralized",
}


def find(name: object) -> type[Strategy]:
    """The class that strategy.name names. Raises ConfigError."""
    return find_class("strategy.name", name, STRATEGIES, Strategy)


def build(options: StrategyOptions, dro: DroOptions) -> Strategy:
    """The strategy of a config's sections `strategy` and `dro`."""
    return find(options.name)(options, dro)
