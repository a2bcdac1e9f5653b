"""Every client trains alone: the floor that a federation has to beat."""

from __future__ import annotations

from typing import Any, ClassVar

from feddra_ds.strategies.base import Strategy
from feddra_ds.strategies.fedavg import ONE_PLAIN_STAGE


class Local(Strategy):
    """No averaging; each client keeps its own model from round to round."""

    presets: ClassVar[dict[str, dict[str, Any]]] = ONE_PLAIN_STAGE
    averages: ClassVar[bool] = False
