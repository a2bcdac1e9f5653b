"""All data in one place: the ceiling that a federation is measured against."""

from __future__ import annotations

from typing import Any, ClassVar

from feddra_ds.strategies.base import Strategy
from feddra_ds.strategies.fedavg import ONE_PLAIN_STAGE


class Centralized(Strategy):
    """One client whose data are everybody's, pooled."""

    presets: ClassVar[dict[str, dict[str, Any]]] = ONE_PLAIN_STAGE
    pools_data: ClassVar[bool] = True
