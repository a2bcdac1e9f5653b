"""Updates that are far larger than the others' (aggregate.max_norm_ratio)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

FEWEST = 3  # of two clients nobody can say which one is wrong


@dataclass
class UpdateNorms:
    """The norms ‖w_i − w_global‖ that are usual, by stage, and so the largest that is averaged.

    A slot adds an update to its sum when its client has trained, before anybody knows the other slots' norms; so the limit is
    that of the round before. Until there is one, the norms of the round itself are compared.
    """

    ratio: float | None  # aggregate.max_norm_ratio; None: any norm is averaged
    medians: dict[str, float] = field(default_factory=dict)  # by stage, of the last round that had one

    def limit(self, stage: str) -> float | None:
        """The largest norm that the next average of this stage takes; None while there is nothing to compare with."""
        median = self.medians.get(stage)
        return None if self.ratio is None or median is None else self.ratio * median

    def far_off(self, stage: str, norms: Mapping[int, float]) -> dict[int, str]:
        """Why a client's update should not have been added: by its index, and only where no limit has told its slot."""
        if self.ratio is None or stage in self.medians or len(norms) < FEWEST:
            return {}
        median = float(np.median(list(norms.values())))
        return {i: too_large(norm, self.ratio * median) for i, norm in norms.items() if norm > self.ratio * median > 0}

    def learn(self, stage: str, norms: Mapping[int, float]) -> None:
        """Take in the norms of the clients that were averaged. Those of clients that did not move say nothing."""
        moved = [norm for norm in norms.values() if norm > 0]
        if self.ratio is not None and moved:
            self.medians[stage] = float(np.median(moved))


def too_large(norm: float, limit: float) -> str:
    return (
        f"its update's norm {norm:.3g} is over {limit:.3g}, which is aggregate.max_norm_ratio times the clients' median"
    )
