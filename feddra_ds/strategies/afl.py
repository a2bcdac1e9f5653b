"""Agnostic federated learning (Mohri et al. 2019, arXiv 1902.00146): the worst mixture of all, not of a ball."""

from __future__ import annotations

from typing import Any, ClassVar

from feddra_ds.strategies.base import Strategy
from feddra_ds.strategies.fedavg import ONE_PLAIN_STAGE


class AFL(Strategy):
    """p ← the projection of p + η L onto the simplex: FedDRA with the whole simplex, projected ascent, no anchors, one stage."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        **ONE_PLAIN_STAGE,
        "dro": {"set": "simplex", "ascent": "projected", "minimum_weight": 0.0, "maximum_weight": None},
    }

    def problems(self, config: Any) -> list[str]:
        if config.clients.per_round is None or config.dro.minimum_weight > 0:
            return []
        return [
            "clients.per_round: may draw none but clients of weight 0, which leave strategy.name=afl nothing to average; "
            "set dro.minimum_weight above 0, or null"
        ]
