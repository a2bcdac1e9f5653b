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
    """Pictures → standardised features → logits (B, C), with a copy of `encoder` and the layer `start` on what it gives."""

    def __init__(self, encoder: ImageEncoder, mean: Tensor, std: Tensor, start: nn.Linear):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.linear = copy.deepcopy(start).float()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.linear((self.encoder(pixel_values) - self.mean) / self.std).float()

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
    that the mean over a batch of any part of them needs no other process's counts. counts: training pairs with each label.
    """

    sizes: list[int]
    weights: list[Tensor]
    counts: list[int]

    def penalty(self, weight: Tensor, strength: float) -> Tensor:
        """scikit-learn's L2 penalty of a layer's weight (C, F), in the unit of this loss. strength: its C. Two classes have one
        weight there, the difference of the two here."""
        total = weight.new_zeros(())
        for part, count in zip(weight.split(self.sizes), self.counts, strict=True):
            total = total + part.square().sum() * (2 if len(part) == 2 else 1) / (2 * strength * max(count, 1))
        return total / len(self.sizes)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, C), targets (B, K) int64, -1 unknown."""
        total = logits.new_zeros(())
        for part, target, weight in zip(logits.split(self.sizes, 1), targets.T, self.weights, strict=True):
            each = F.cross_entropy(part, target, ignore_index=-1, reduction="none")
            total = total + (each * weight.to(each.device)[target.clamp(min=0)]).mean()
        return total / len(self.sizes)


def loss_of(tasks: Sequence[Task], targets: NDArray[np.int64], balanced: bool) -> Loss:
    """The loss for training pairs with `targets` (n, K). balanced: classes of a label weigh alike, however rare they are."""
    weights, known = [], []
    for task, column in zip(tasks, targets.T, strict=True):
        counts = np.bincount(column[column >= 0], minlength=len(task.classes))
        there = max(int((counts > 0).sum()), 1)
        each = 1 / (there * np.maximum(counts, 1)) if balanced else np.full(len(counts), 1 / max(int(counts.sum()), 1))
        weights.append(torch.tensor(len(targets) * each, dtype=torch.float32))
        known.append(int(counts.sum()))
    return Loss([len(task.classes) for task in tasks], weights, known)
