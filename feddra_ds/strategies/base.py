"""What a strategy may decide; the round loop asks these questions and nothing else. N: number of clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from feddra_ds.config.schema import Config
from feddra_ds.strategies import robust_weights

Vector = NDArray[np.float64]


class Strategy:
    """One shared model, averaged with weights p that follow equation (4)."""

    averages = True  # the server averages the clients' models; False: each client keeps its own
    pools_data = False  # one client that holds everybody's data

    def center(self, config: Config, num_samples: Sequence[int]) -> Vector:
        """c of equation (4), (N,)."""
        return (
            robust_weights.samples_center(num_samples)
            if config.dro.center == "samples"
            else robust_weights.uniform_center(len(num_samples))
        )

    def initial_weights(self, config: Config, center: Vector) -> Vector:
        """p of the first round, (N,)."""
        return (
            center.copy()
            if config.dro.fixed_weights is None
            else np.asarray(config.dro.fixed_weights, dtype=np.float64)
        )

    def next_weights(self, config: Config, p: Vector, losses: Sequence[float], center: Vector) -> Vector:
        """p of the next round from the losses L_i of the new global model, (N,)."""
        if config.dro.fixed_weights is not None:
            return p
        # η is stated for the sum of the two directions; their mean halves every loss
        eta = config.dro.step_size * (2.0 if config.objective.direction_reduction == "mean" else 1.0)
        return robust_weights.update_weights(p, losses, eta, config.dro.radius, center)
