"""Federated algorithms, one small file each: what each does differently from FedDRA. Their config defaults are in config.py."""

from __future__ import annotations

from feddra_ds.config.schema import StrategyConfig
from feddra_ds.strategies.base import Strategy
from feddra_ds.strategies.centralized import Centralized
from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.feddra import FedDRA
from feddra_ds.strategies.local import Local

STRATEGIES: dict[str, type[Strategy]] = {"feddra": FedDRA, "fedavg": FedAvg, "local": Local, "centralized": Centralized}


def build(config: StrategyConfig) -> Strategy:
    """The strategy named by strategy.name."""
    return STRATEGIES[config.name]()
