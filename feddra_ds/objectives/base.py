"""What an objective is: features of a batch → the loss that a client trains on, and the L_i that moves the weights p.

B: pairs of this rank, n: pairs that are looked at, D: embedding size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from feddra_ds.objectives.features import Features
from feddra_ds.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from feddra_ds.losses import DroLoss


class Learned(NamedTuple):
    """A tensor that an objective learns beside the model: its shape, and where it starts."""

    shape: tuple[int, ...]
    start: float = 0.0
    """Mean of its elements."""
    std: float = 0.0
    """Their standard deviation; 0: all alike."""


class Objective(ABC):
    """A local objective. Yours is a subclass, named in objective.name as package.module:Class.

    `Options` holds its keys, a subclass of ObjectiveOptions; they are given, checked and shown like every other key of
    the section `objective`. Importing the module of an objective of ours must not import torch: the config is read first.
    """

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    """What Features must hold beside the embeddings: features.TOKENS, features.WORDS, or nothing."""
    normalises: ClassVar[bool] = False
    """Whether it normalises embeddings itself: stage 1's anchors then come as they leave the heads, which spares a pass."""
    takes_head_outputs: bool = False
    """Whether embeddings come in training as they leave the heads, in the model's dtype; only where `normalises`."""
    num_kept: ClassVar[int] = 0
    """Numbers that it keeps of each training pair, with the client: Features.kept, from `remember`."""
    loss_scale: float = 1.0
    """Factor that brings L_i to the scale of the two directions' sum, for which dro.step_size is stated."""

    def __init__(self, options: Any):
        """options: an instance of `Options`."""
        self.options = options

    @classmethod
    def learned(cls, options: Any, embedding_dim: int) -> dict[str, Learned]:
        """What it learns itself, by name: part of the alignment module, averaged and saved with it. Features.learned has
        the values, by sorted names."""
        return {}

    @property
    def needs_anchors(self) -> bool:
        """Whether the global model's features of each batch are computed."""
        return bool(self.options.anchor_weight > 0)

    @abstractmethod
    def __call__(self, features: Features, anchors: Features | None, group: dist.ProcessGroup | None) -> DroLoss:
        """The loss of the client's batch, of which this rank holds `features`; `group`: the client's ranks (None: one).

        `.total` is equal on every rank of the group; its gradient on a rank is that rank's additive share, which
        Features.gathered gives. anchors: the global model's features of the same pairs, without gradient, or None: then
        the loss is without its anchor term. features.text_ids are equal where two pairs have the same report.
        """

    def remember(self, features: Features, group: dist.ProcessGroup | None) -> Tensor:
        """(B, num_kept) what to keep of this rank's pairs, after a step that was taken. Without gradient; collective over
        the group. Called only where num_kept > 0."""
        raise NotImplementedError

    def equation_3(self, alignment: Tensor, anchor: Tensor | None) -> DroLoss:
        """ℓ = λ₁ alignment + λ₂ anchor, and its mean, from both terms of every pair of the whole batch, (W·B,) each."""
        import torch

        from feddra_ds.losses import DroLoss

        anchor = torch.zeros_like(alignment) if anchor is None else anchor
        per_sample = self.options.alignment_weight * alignment + self.options.anchor_weight * anchor
        return DroLoss(per_sample.mean(), per_sample.detach(), alignment.detach(), anchor.detach())

    @abstractmethod
    def per_pair(self, features: Features, text_ids: Tensor) -> Tensor:
        """(n,) loss of each pair among the n given, without anchors: their mean is L_i of equation (4).

        text_ids: (n,) int64; pairs of equal id have the same report. Called without gradient, on embeddings alone.
        """

    @abstractmethod
    def chance(self, batch_size: int) -> float:
        """The mean of per_pair over a batch of so many pairs, no two of one report, under a model that knows nothing."""


def anchor_distance(features: Features, anchors: Features, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """(B,) equation (2): the squared differences of the embeddings to the global model's, both sides together.

    reduction: over the embedding's dimensions; give it options.anchor_reduction.
    """
    image, text = (features.image - anchors.image).square(), (features.text - anchors.text).square()
    return image.mean(-1) + text.mean(-1) if reduction == "mean" else image.sum(-1) + text.sum(-1)
