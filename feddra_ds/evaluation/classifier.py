"""A classifier of pictures on a trained image encoder: one linear layer, whose logits are those of several labels.

Legend: B batch, S side of the image, F features, K labels, C classes of all labels together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from feddra_ds.evaluation.labels import Task
from feddra_ds.model import encoders, towers
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.heads import BatchNorm


class ImageEncoder(nn.Module):
    """A copy of a dual encoder's image side up to its head: (B, 3, S, S) → (B, F) fp32, the features that probes use."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone.vision)
        self.aligner = copy.deepcopy(model.aligner.vision)
        self.aligner.head = nn.Identity()  # type: ignore[assignment]
        self.layout = model.backbone.layouts["vision"]
        self.float()

    def forward(self, pixel_values: Tensor) -> Tensor:
        images = encoders.image_inputs(self.backbone.config, pixel_values)
        return self.aligner(towers.run(self.backbone, self.layout, None, **images))[0].float()

    def freeze_unused(self, image_size: int) -> None:
        """Freeze the parameters that the features do not depend on: gradients of theirs, processes would wait for in vain."""
        self.requires_grad_(True).eval()
        device = next(self.parameters()).device
        self(torch.zeros(1, 3, image_size, image_size, device=device)).sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad()


class Classifier(nn.Module):
    """Standardised features → logits (B, C). Begins with all logits 0, or with the layer of another one, on a copy.

    encoder: what gives the features; None where the features are what comes in.
    """

    def __init__(
        self,
        encoder: ImageEncoder | None,
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
        num_outputs: int,
        start: Classifier | None = None,
    ):
        super().__init__()
        self.encoder = nn.Identity() if encoder is None else copy.deepcopy(encoder)
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("std", torch.from_numpy(std))
        self.linear = nn.Linear(len(mean), num_outputs)
        if start is None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        else:
            self.linear.load_state_dict(start.linear.state_dict())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear((self.encoder(inputs) - self.mean) / self.std)

    def train(self, mode: bool = True) -> Classifier:
        """Batchnorms stay as the encoder was trained: the small batches of few labels would spoil their statistics, and on
        several processes each would have its own."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.eval()
        return self


@dataclass(frozen=True)
class Loss:
    """The mean over K labels of a weighted cross-entropy, each over its own slice of the logits; unknown targets count 0.

    sizes: classes of each label. weights: a float32 weight for each class of each label, of mean 1 over the training pairs, so
    that the mean over a batch of any part of them needs no other process's counts.
    """

    sizes: list[int]
    weights: list[Tensor]

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, C), targets (B, K) int64, -1 unknown."""
        total = logits.new_zeros((), dtype=torch.float32)
        for part, target, weight in zip(logits.float().split(self.sizes, 1), targets.T, self.weights, strict=True):
            each = F.cross_entropy(part, target, ignore_index=-1, reduction="none")
            total = total + (each * weight.to(each.device)[target.clamp(min=0)]).mean()
        return total / len(self.sizes)


def loss_of(tasks: Sequence[Task], targets: NDArray[np.int64], balanced: bool) -> Loss:
    """The loss for training pairs with `targets` (n, K). balanced: classes of a label weigh alike, however rare they are."""
    weights = []
    for task, column in zip(tasks, targets.T, strict=True):
        counts = np.bincount(column[column >= 0], minlength=len(task.classes))
        there = max(int((counts > 0).sum()), 1)
        each = 1 / (there * np.maximum(counts, 1)) if balanced else np.full(len(counts), 1 / max(int(counts.sum()), 1))
        weights.append(torch.tensor(len(targets) * each, dtype=torch.float32))
    return Loss([len(task.classes) for task in tasks], weights)
