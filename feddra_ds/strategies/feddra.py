"""FedDRA (arXiv 2404.03854): robust weights in a χ² ball, anchors, two stages. The base behaviour is its own."""

from __future__ import annotations

from feddra_ds.strategies.base import Strategy


class FedDRA(Strategy):
    """Equations (1) to (4) as they stand."""
