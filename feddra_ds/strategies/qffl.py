"""q-FFL by q-FedAvg (Li et al. 2020, arXiv 1905.10497, algorithm 2): clients count by a power of their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from feddra_ds.strategies.base import Averaged, SliceState
from feddra_ds.strategies.fedavg import FedAvg
from feddra_ds.strategies.limits import clients_undo_the_step, factors_are_new
from feddra_ds.strategies.mixture_set import Vector
from feddra_ds.strategies.options import StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-10  # a loss of 0 has neither a power below 0 nor a reciprocal


class QFFLOptions(StrategyOptions):
    q: float = Field(1.0, ge=0)
    """q of the objective Σ c_i L_i^(q+1)/(q+1); 0 is fedavg, and the larger it is the more the worst client counts."""
    lipschitz: float | None = Field(None, ge=0)
    """L, which shortens the server's step where clients went far; null takes 1 / optimizer.lr (the paper), 0 never shortens."""


class QFFL(FedAvg):
    """w ← w − Σ c_i Δ_i / Σ c_i h_i with Δ_i = F_i^q L (w − w_i) and h_i = q F_i^(q−1) ‖L (w − w_i)‖² + L F_i^q.

    With p_i ∝ c_i F_i^q that is w + s (Σ p_i w_i − w), s = 1/(1 + q L Σ p_i ‖w − w_i‖²/F_i). F_i is L_i of the newest global
    model that was measured; the first round, before which none was, is fedavg's.
    """

    Options: ClassVar[type[StrategyOptions]] = QFFLOptions

    def problems(self, config: Any) -> list[str]:
        out = clients_undo_the_step(config)
        if self.options.q > 0 and self.options.lipschitz != 0:
            out += factors_are_new(config)
        if config.dro.fixed_weights is not None:
            out.append("dro.fixed_weights: strategy.name=qffl moves p by its own rule; remove it, or take fedavg")
        if config.dro.apply != "aggregate":
            out.append(
                f"dro.apply: {config.dro.apply} gives strategy.name=qffl no weights in its average; use aggregate"
            )
        if self.options.lipschitz is None and self.options.q > 0 and config.optimizer.name != "sgd":
            out.append(
                f"strategy.lipschitz: null takes 1 / optimizer.lr, which optimizer.name={config.optimizer.name} does not go "
                "by; give a number (0: the weighted mean itself), or use sgd"
            )
        return out

    def next_mixture(self, p: Vector, losses: Vector, center: Vector) -> Vector:
        """p_i ∝ c_i L_i^q among the clients with a loss; the others keep theirs."""
        known = ~np.isnan(losses)
        if not known.any():
            return p
        log_q = self.options.q * np.log(np.maximum(losses[known], _SMALL))
        powers = center[known] * np.exp(log_q - log_q.max())
        out = p.copy()
        out[known] = (1.0 - p[~known].sum()) * (powers / powers.sum())
        return out

    def fold_drifts(self, weights: Vector, losses: Vector, squares: Vector) -> float:
        """Σ p_i ‖w − w_i‖²/F_i; a client without a loss counts with the mean of the others."""
        if np.isnan(losses).all():
            return 0.0
        filled = np.where(np.isnan(losses), np.nanmean(losses), losses)
        return float(np.sum(weights * squares / np.maximum(filled, _SMALL)))

    def server_step(self, old: list[Tensor], mean: list[Tensor], state: SliceState, about: Averaged) -> list[Tensor]:
        given = self.options.lipschitz
        lipschitz = 1 / about.learning_rate if given is None else given
        scale = 1 / (1 + self.options.q * lipschitz * about.drift)
        return [w.lerp(target, scale) for w, target in zip(old, mean, strict=True)]
