"""What the objectives on regions and words share: pooling, the anchors of tokens, and loops that hold little at a time.

B pairs of this rank, W ranks, R regions of an image, T word pieces, L words, D embedding size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, field_validator

from feddra_ds import losses
from feddra_ds.common.section import MAY_CHANGE
from feddra_ds.objectives.alignment import Alignment, AlignmentOptions
from feddra_ds.objectives.features import TOKENS, WORDS, Features

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class TokenOptions(AlignmentOptions):
    """Keys of the objectives on regions and words."""

    temperature: float = Field(0.1, gt=0)
    """τ of equation (1) on the global embeddings, or its initial value when it is learned."""
    anchor_tokens: bool = False
    """Hold the embeddings of regions and words near the global model's too, with the same weight as the global ones."""
    chunk_bytes: int = Field(2**28, ge=1, json_schema_extra=MAY_CHANGE)
    """Bytes of word-region scores that are held at a time; less is slower, and the result is the same."""

    @field_validator("bf16_products")
    @classmethod
    def _needs_unit_norm(cls, value: bool) -> bool:
        if value:
            raise ValueError("is for ita and convirt; objectives on regions and words take embeddings of unit length")
        return value


class Tokens(NamedTuple):
    """Regions and words of a rank's pairs, unit norm."""

    regions: Tensor
    """(B, R, D): patches alone, without class or register tokens."""
    words: Tensor
    """(B, L, D): each the mean direction of its pieces; 0 where there is none."""
    mask: Tensor
    """(B, L) bool: whether there is a word."""


class TokenAlignment(Alignment):
    """Equation (3) on the global embeddings, and `token_terms` beside ITA. L_i is the global embeddings' ITA alone."""

    needs: ClassVar[frozenset[str]] = frozenset({TOKENS, WORDS})
    normalises: ClassVar[bool] = False
    Options = TokenOptions
    options: TokenOptions

    @abstractmethod
    def token_terms(self, features: Features, tokens: Tokens, group: dist.ProcessGroup | None) -> Tensor:
        """(W·B,) what stands beside ITA_j, for every pair of the client's batch. Its gradient on a rank is that of this
        rank's embeddings, and a share for what is replicated. Collective over the group."""

    def __call__(self, features: Features, anchors: Features | None, group: dist.ProcessGroup | None) -> losses.DroLoss:
        from feddra_ds.distributed.collectives import gather, group_rank

        loss = super().__call__(features, anchors, group)
        terms = self.token_terms(features, pooled(features), group)
        rows = slice(group_rank(group) * len(loss.per_sample), (group_rank(group) + 1) * len(loss.per_sample))
        mine = terms.detach()[rows]
        total = loss.total + self.options.alignment_weight * terms.mean()
        loss = loss._replace(per_sample=loss.per_sample + mine, alignment=loss.alignment + mine)
        if anchors is not None and self.options.anchor_tokens:
            distance = self._token_distance(features, anchors)
            total = total + self.options.anchor_weight * gather(distance, group, "slice").mean()
            held = distance.detach()
            weight = self.options.anchor_weight / self.options.alignment_weight
            loss = loss._replace(per_sample=loss.per_sample + weight * held, anchor=loss.anchor + held)
        return loss._replace(total=total)

    def _token_distance(self, features: Features, anchors: Features) -> Tensor:
        """(B,) equation (2) of regions and words: the mean over an image's regions, and over a text's words."""
        ours = pooled(features)
        theirs = pooled(anchors._replace(words=features.words))
        reduce = lambda x: x.square().mean(-1) if self.options.anchor_reduction == "mean" else x.square().sum(-1)
        regions = reduce(ours.regions - theirs.regions).mean(1)
        words = reduce(ours.words - theirs.words) * ours.mask
        return regions + words.sum(1) / ours.mask.sum(1).clamp(min=1)


def pooled(features: Features) -> Tokens:
    """Patches without the tokens before them (images are square, so R is a square number), and pieces pooled to words."""
    import torch
    from torch.nn.functional import normalize

    assert features.image_tokens is not None
    assert features.text_tokens is not None
    assert features.words is not None
    num_patches = math.isqrt(features.image_tokens.shape[1]) ** 2
    pieces, number = features.text_tokens, features.words
    num_words = max(int(number.max()) + 1, 1)
    of_word = torch.nn.functional.one_hot(number.clamp(min=0), num_words).to(pieces.dtype) * (number >= 0)[..., None]
    words = torch.einsum("btl,btd->bld", of_word, pieces)
    mask = torch.arange(num_words, device=number.device) <= number.amax(1, keepdim=True)
    return Tokens(features.image_tokens[:, -num_patches:], normalize(words, dim=-1) * mask[..., None], mask)


def in_chunks(
    compute: Callable[..., Tensor], length: int, bytes_each: int, chunk_bytes: int, cut: Callable[[slice], Any]
) -> Tensor:
    """`compute` on cut(rows) of `length` rows, a chunk at a time, stacked; the backward pass computes each chunk again."""
    import torch
    from torch.utils.checkpoint import checkpoint

    step = max(1, chunk_bytes // bytes_each)
    parts = []
    for start in range(0, length, step):
        inputs = cut(slice(start, min(start + step, length)))
        parts.append(checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)
