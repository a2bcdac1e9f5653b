"""FedAvg (McMahan et al. 2017): FedDRA at radius 0 around the clients' shares of the pairs, no anchors, one stage."""

from __future__ import annotations

from typing import Any, ClassVar

from feddra_ds.strategies.base import Strategy

ONE_PLAIN_STAGE: dict[str, dict[str, Any]] = {
    "dro": {"radius": 0.0},
    "objective": {"anchor_weight": 0.0},
    "schedule": {"stage1_steps": 0, "stage2_steps": 70},
}


class FedAvg(Strategy):
    """The same path as FedDRA: at radius 0 the weights stay at the centre to the bit. `dro.center: uniform` is the plain mean."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {**ONE_PLAIN_STAGE, "dro": {"radius": 0.0, "center": "samples"}}
