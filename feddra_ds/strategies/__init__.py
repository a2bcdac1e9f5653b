"""Federated algorithms, one small file each: what each does differently from FedDRA. Their config defaults are in config.py."""

from __future__ import annotations

from ..config import StrategyConfig
from .base import Strategy
from .centralized import Centralized
from .fedavg import FedAvg
from .feddra import FedDRA
from .local import Local

STRATEGIES: dict[str, type[Strategy]] = {"feddra": FedDRA, "fedavg": FedAvg, "local": Local, "centralized": Centralized}


def build(config: StrategyConfig) -> Strategy:
    """The strategy named by strategy.name."""
    return STRATEGIES[config.name]()
