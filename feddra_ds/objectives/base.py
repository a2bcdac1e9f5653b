"""What an objective is. B: pairs of this rank, D: embedding size."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from feddra_ds.losses.types import DroLoss


class Anchors(NamedTuple):
    """The global model's embeddings of the same views, without gradient: each (B, D)."""

    image: Tensor
    text: Tensor


class Objective(Protocol):
    """Equation (3) with a pluggable alignment loss."""

    needs_anchors: bool

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        temperature: Tensor | float,
        anchors: Anchors | None,
        group: dist.ProcessGroup | None,
    ) -> DroLoss:
        """Losses of this rank's (B, D) embeddings; `group` is the client's ranks (None: this process alone).

        `.total` is the client's loss L_i of equation (3), equal on every rank of the group.
        """
        ...
