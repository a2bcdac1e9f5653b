"""All data in one place: the ceiling that a federation is measured against."""

from __future__ import annotations

from feddra_ds.strategies.base import Strategy


class Centralized(Strategy):
    """One client whose data are everybody's, pooled."""

    pools_data = True
