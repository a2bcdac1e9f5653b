"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): AdamW on the clients, Nesterov momentum on the server, many local steps."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from feddra_ds.strategies.fedavgm import FedAvgM, FedAvgMOptions
from feddra_ds.strategies.options import StrategyOptions


class DiLoCoOptions(FedAvgMOptions):
    server_lr: float = Field(0.7, gt=0)
    """Learning rate of the outer Nesterov step (the paper: 0.7); 1 with server_momentum = 0 is fedavg."""


class DiLoCo(FedAvgM):
    """v ← β v + (mean − w), w ← w + server_lr · (β v + (mean − w)).

    The paper's clients keep AdamW's moments from round to round; here they start anew in each.
    """

    Options: ClassVar[type[StrategyOptions]] = DiLoCoOptions
    nesterov: ClassVar[bool] = True
