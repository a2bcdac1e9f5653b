"""FedAvg (McMahan et al. 2017): FedDRA with radius 0, no anchors and one stage, all of it config (STRATEGY_DEFAULTS)."""

from __future__ import annotations

from feddra_ds.strategies.base import Strategy


class FedAvg(Strategy):
    """The same path as FedDRA: at radius 0 the weights stay at the centre to the bit."""
