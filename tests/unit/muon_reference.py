"""A plain step of Muon and of AdamW for one parameter in one process, written from the papers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps of Jordan et al. 2024 on the wide form of the matrix, in float32."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_step(weight: Tensor, gradient: Tensor, state: dict[str, Any], lr: float, decay: float, beta: float) -> Tensor:
    """The new weight; state: {} at first. Nesterov's momentum; the step has AdamW's root mean square (2502.16982)."""
    state["m"] = beta * state.get("m", torch.zeros_like(weight)) + (1 - beta) * gradient
    update = orthogonal((1 - beta) * gradient + beta * state["m"])
    return weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(weight.shape)) * update


def adamw_step(weight: Tensor, gradient: Tensor, state: dict[str, Any], lr: float, decay: float) -> Tensor:
    """The new weight, with AdamW's default constants; state: {} at first."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", torch.zeros_like(weight)) + 0.1 * gradient
    state["v"] = 0.999 * state.get("v", torch.zeros_like(weight)) + 0.001 * gradient**2
    mean, square = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    return weight * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)
