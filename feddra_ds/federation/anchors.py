"""Where the anchors of equation (2) come from."""

from __future__ import annotations

import copy

import torch
from torch import nn


def frozen_twin(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy without gradients, in eval mode, in the forward's dtype; made before DeepSpeed partitions the module."""
    return copy.deepcopy(module).requires_grad_(False).eval().to(device=device, dtype=dtype)
