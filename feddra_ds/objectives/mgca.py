"""MGCA: pairs are aligned as wholes, token by token, and by the prototypes that they belong to.

Wang, Zhou, Wang, Vardhanabhuti, Yu, "Multi-Granularity Cross-modal Alignment for Generalized Medical Visual Representation
Learning", NeurIPS 2022, arXiv 2210.06044, section 3, in the sum of its directions (twice the paper's):
    ITA   equation (1)
    CTA   within a pair, each region j attends to the words: o_j = Σ_k softmax_k(v_j·t_k / τ) t_k, of unit norm, and
          ½ Σ_j w_j (−log softmax_k(v_j·o_k / τ)_j − log softmax_k(v_k·o_j / τ)_j); words likewise over regions
    CPA   −Σ_k q(t)_k log softmax_k(u·c_k / τ_p) and the other way round, with prototypes c_k of unit norm and assignments q
          of the whole batch from Sinkhorn-Knopp, without gradient
As in the released code, the attention has no projections of its own. Its weights w are the encoders' last attention to
[CLS], which fused attention does not give; here they are the softmax of the tokens' similarity to the pair's embedding, at
temperature τ and without gradient, or equal.

B pairs of this rank, W ranks, R regions, L words, M queries, N keys, D embedding size, K prototypes, b: a chunk's pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from feddra_ds.objectives.base import Learned
from feddra_ds.objectives.features import Features
from feddra_ds.objectives.tokens import TokenAlignment, TokenOptions, Tokens, in_chunks

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class MgcaOptions(TokenOptions):
    """Keys of `mgca`."""

    token_weight: float = Field(1.0, ge=0)
    """Weight of CTA beside ITA."""
    prototype_weight: float = Field(1.0, ge=0)
    """Weight of CPA beside ITA."""
    token_temperature: float = Field(0.1, gt=0)
    """τ of CTA: of its attention and of its losses."""
    token_weights: Literal["similarity", "equal"] = "similarity"
    """How much each region and word counts in CTA: by its similarity to the pair's embedding, or all alike."""
    num_prototypes: int = Field(500, ge=2)
    """K, which are learned as part of the alignment module."""
    prototype_temperature: float = Field(0.2, gt=0)
    """τ_p of CPA."""
    sinkhorn_epsilon: float = Field(0.05, gt=0)
    """Softness of the assignments; smaller is harder."""
    sinkhorn_steps: int = Field(3, ge=1)
    """Steps of Sinkhorn-Knopp."""


class Mgca(TokenAlignment):
    """ℓ = λ₁ (ITA + token_weight · CTA + prototype_weight · CPA) + λ₂ ANC."""

    Options = MgcaOptions
    options: MgcaOptions

    @classmethod
    def learned(cls, options: Any, embedding_dim: int) -> dict[str, Learned]:
        return {"prototypes": Learned((options.num_prototypes, embedding_dim), std=1 / math.sqrt(embedding_dim))}

    def token_terms(self, features: Features, tokens: Tokens, group: dist.ProcessGroup | None) -> Tensor:
        from feddra_ds.distributed.collectives import gather

        terms = self.options.token_weight * self._tokens(features, tokens)
        terms = terms + self.options.prototype_weight * self._prototypes(features, group)
        return gather(terms, group, "slice")

    def _tokens(self, features: Features, tokens: Tokens) -> Tensor:
        """(B,) CTA of each pair, some pairs at a time."""
        options, (size, num_regions, dim), length = self.options, tokens.regions.shape, tokens.words.shape[1]
        both = num_regions + length
        bytes_each = 3 * both * (both + dim) * tokens.regions.element_size()
        rows = (tokens.regions, tokens.words, tokens.mask, features.image, features.text)
        return in_chunks(
            pair_tokens, size, bytes_each, options.chunk_bytes,
            lambda part: (*(x[part] for x in rows), options.token_temperature, options.token_weights == "similarity"),
        )  # fmt: skip

    def _prototypes(self, features: Features, group: dist.ProcessGroup | None) -> Tensor:
        """(B,) CPA of each pair, whose assignments are balanced over the client's ranks."""
        from torch.nn.functional import normalize

        options, (prototypes,) = self.options, features.learned
        centers = normalize(prototypes, dim=-1)
        scores = [x @ centers.T for x in (features.image, features.text)]
        image, text = (assignments(x, options.sinkhorn_epsilon, options.sinkhorn_steps, group) for x in scores)
        of_image, of_text = ((x / options.prototype_temperature).log_softmax(-1) for x in scores)
        return -(text * of_image).sum(-1) - (image * of_text).sum(-1)


def pair_tokens(
    regions: Tensor, words: Tensor, mask: Tensor, image: Tensor, text: Tensor, temperature: float, weighs: bool
) -> Tensor:
    """(b,) CTA of pairs: regions (b, R, D), words (b, L, D) with mask (b, L), embeddings (b, D). Without words it is 0."""
    import torch

    some = mask.any(1)
    words_mask = mask | ~some[:, None]
    all_regions = torch.ones_like(regions[..., 0], dtype=torch.bool)
    visual = _attended(regions, all_regions, words, words_mask, image if weighs else None, temperature)
    textual = _attended(words, words_mask, regions, all_regions, text if weighs else None, temperature)
    return (visual + textual) / 2 * some


def _attended(
    queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor, whole: Tensor | None, temperature: float
) -> Tensor:
    """(b,) CTA's term of queries (b, M, D) that attend to keys (b, N, D): Σ_j w_j of both directions' cross-entropies."""
    import torch
    from torch.nn.functional import normalize

    attention = (queries @ keys.mT / temperature).masked_fill(~key_mask[:, None], -torch.inf).softmax(-1)
    found = normalize(attention @ keys, dim=-1)
    scores = queries @ found.mT / temperature
    own = scores.diagonal(dim1=1, dim2=2)
    out = query_mask[:, None, :]
    losses = scores.masked_fill(~out, -torch.inf).logsumexp(2) + scores.masked_fill(~out.mT, -torch.inf).logsumexp(1)
    with torch.no_grad():
        likeness = own.new_zeros(own.shape) if whole is None else (queries @ whole[..., None])[..., 0] / temperature
        weights = likeness.masked_fill(~query_mask, -torch.inf).softmax(-1)
    return (weights * (losses - 2 * own)).sum(-1)


def assignments(scores: Tensor, epsilon: float, num_steps: int, group: dist.ProcessGroup | None) -> Tensor:
    """(B, K) of this rank's pairs, each row a distribution: Sinkhorn-Knopp of exp(scores / ε) over all ranks' pairs.

    Every step gives all prototypes the same mass, then all pairs. No gradient. Collective over the group.
    """
    import torch

    from feddra_ds.distributed.collectives import gather, group_rank

    with torch.no_grad():
        log_q = gather(scores.detach(), group, "slice") / epsilon
        for _ in range(num_steps):
            log_q = log_q - log_q.logsumexp(0, keepdim=True)
            log_q = log_q - log_q.logsumexp(1, keepdim=True)
        first = group_rank(group) * len(scores)
        return torch.Tensor.exp(log_q[first : first + len(scores)])
