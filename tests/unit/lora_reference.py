"""The averaging rules of adapters over whole tensors, which the sharded average is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from feddra_ds.model.lora import Factors, average_product, mean_update, pairs


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train in some stage: they alone travel, are averaged and saved."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], rule: str) -> dict[str, Tensor]:
    """Σ pᵢ θᵢ of trained parameters by name, whole tensors in fp32; adapters by `rule`, all else plainly.

    Raises ValueError unless there is a weight per state and the weights sum to 1.
    """
    if len(states) != len(weights) or not states or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"{len(states)} states need as many weights that sum to 1, got {list(weights)}")
    out = {}
    for name in states[0]:
        out[name] = sum((p * s[name].float() for p, s in zip(weights, states, strict=True)), torch.zeros(()))
    if rule == "product":
        for a, b in pairs(list(out)):
            factors = average_product([Factors(s[a], s[b]) for s in states], weights)
            out[a], out[b] = factors
    return out


def update_error(factors: Factors, clients: Sequence[Factors], weights: Sequence[float]) -> float:
    """‖B A − Σ pᵢ Bᵢ Aᵢ‖ / ‖Σ pᵢ Bᵢ Aᵢ‖ in the Frobenius norm; 0 where both are 0."""
    _, mean, _ = mean_update(clients, weights)
    _, difference, _ = mean_update([*clients, factors], [*weights, -1.0])
    return float(difference.norm() / mean.norm()) if mean.norm() > 0 else float(difference.norm())
