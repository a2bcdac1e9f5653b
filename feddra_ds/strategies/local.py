"""Every client trains alone: the floor that a federation has to beat."""

from __future__ import annotations

from feddra_ds.strategies.base import Strategy


class Local(Strategy):
    """No averaging; each client keeps its own model from round to round."""

    averages = False
