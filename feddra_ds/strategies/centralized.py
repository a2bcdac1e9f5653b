"""All data in one place: the ceiling that a federation is measured against."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from feddra_ds.strategies.base import Strategy
from feddra_ds.strategies.fedavg import ONE_PLAIN_STAGE
from feddra_ds.strategies.options import StrategyOptions


class CentralizedOptions(StrategyOptions):
    budget: Literal["federation", "client"] = "federation"
    """Pairs of a round: as many as all the data owners together train on in a federation (its local steps times their number),
    or as many as one of them."""


class Centralized(Strategy):
    """One client whose data are everybody's, pooled."""

    Options: ClassVar[type[StrategyOptions]] = CentralizedOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = ONE_PLAIN_STAGE
    pools_data: ClassVar[bool] = True

    def step_factor(self, num_owners: int) -> int:
        return num_owners if self.options.budget == "federation" else 1
