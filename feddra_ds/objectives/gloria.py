"""GLoRIA: global embeddings are matched, and words with the regions that they attend to.

Huang, Shen, Lungren, Yeung, "GLoRIA: A Multimodal Global-Local Representation Learning Framework for Label-efficient
Medical Image Recognition", ICCV 2021, section 3.2. With regions v_j and words t_i of an image and a text, all of unit norm,
    a_ij = exp(t_i·v_j / τ₁) / Σ_k exp(t_i·v_k / τ₁)        c_i = Σ_j a_ij v_j
    Z = τ₂ log Σ_i exp(cos(c_i, t_i) / τ₂)
and the local loss is equation (1) with Z / τ₃ in the place of S. A text without words matches all images alike (Z = 0).

B pairs of this rank, W ranks, R regions, L words, D embedding size, b and c: a chunk's images and texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from feddra_ds.objectives.features import Features
from feddra_ds.objectives.tokens import TokenAlignment, TokenOptions, Tokens, in_chunks

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class GloriaOptions(TokenOptions):
    """Keys of `gloria`."""

    local_weight: float = Field(1.0, ge=0)
    """Weight of the local loss beside the global one (the paper: 1)."""
    attention_temperature: float = Field(0.25, gt=0)
    """τ₁, of a word's attention over regions (the paper's code: 1/4)."""
    word_temperature: float = Field(0.2, gt=0)
    """τ₂, of the words' part in a text's score (the paper's code: 1/5)."""
    local_temperature: float = Field(0.1, gt=0)
    """τ₃, of the local loss (the paper's code: 1/10)."""


class Gloria(TokenAlignment):
    """ℓ = λ₁ (ITA + local_weight · the same two terms of Z / τ₃) + λ₂ ANC."""

    Options = GloriaOptions
    options: GloriaOptions

    def token_terms(self, features: Features, tokens: Tokens, group: dist.ProcessGroup | None) -> Tensor:
        from feddra_ds.distributed.collectives import gather
        from feddra_ds.losses.reference import both_directions

        words, mask = _words_of_all(tokens, group)
        scores = gather(self._scores(tokens.regions, words, mask), group, "slice")
        ids = None if features.text_ids is None else gather(features.text_ids, group, "slice")
        rows, columns = both_directions(scores / self.options.local_temperature, ids, self.options.duplicates)
        return self.options.local_weight * (rows + columns)

    def _scores(self, regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """(B, W·B) Z of this rank's images with all texts, in chunks of both."""
        taus = (self.options.attention_temperature, self.options.word_temperature)
        (num_regions, dim), num_words = regions.shape[1:], words.shape[1]
        # scores, their exponentials, the attention and its context
        bytes_each = num_words * (3 * num_regions + dim) * regions.element_size()
        texts_at_once = min(len(words), max(1, self.options.chunk_bytes // bytes_each))

        def of_texts(texts: slice) -> Tensor:
            return in_chunks(
                word_region_scores, len(regions), bytes_each * texts_at_once, self.options.chunk_bytes,
                lambda images: (regions[images], words[texts], mask[texts], *taus),
            )  # fmt: skip

        import torch

        starts = range(0, len(words), texts_at_once)
        return torch.cat([of_texts(slice(start, start + texts_at_once)) for start in starts], 1)


def word_region_scores(regions: Tensor, words: Tensor, mask: Tensor, attention: float, word: float) -> Tensor:
    """(b, c) Z of images' regions (b, R, D) and texts' words (c, L, D) with their mask (c, L); τ₁ and τ₂."""
    import torch

    similarity = torch.einsum("brd,cld->bclr", regions, words)
    weights = (similarity / attention).softmax(-1)
    context = torch.einsum("bclr,brd->bcld", weights, regions)
    cosine = (weights * similarity).sum(-1) / context.norm(dim=-1).clamp(min=1e-6)
    some = mask.any(1)
    open_mask = mask | ~some[:, None]  # a text without words: nothing is −∞, and its scores are 0
    return word * (cosine / word).masked_fill(~open_mask, -torch.inf).logsumexp(-1) * some


def _words_of_all(tokens: Tokens, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(W·B, L, D) words and (W·B, L) mask of every rank, padded to the longest; each rank's scores add to the gradient."""
    if group is None:
        return tokens.words, tokens.mask
    from torch.nn.functional import pad

    from feddra_ds.distributed.collectives import gather, gather_ints

    length = tokens.words.shape[1]
    missing = max(found for (found,) in gather_ints([length], group, tokens.words.device)) - length
    words, mask = pad(tokens.words, (0, 0, 0, missing)), pad(tokens.mask.long(), (0, missing))
    return gather(words, group, "sum"), gather(mask, group, "slice").bool()
