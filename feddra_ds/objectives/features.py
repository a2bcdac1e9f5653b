"""What a model gives an objective. B: pairs of this rank, D: embedding size, R: image regions, T: text tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

TOKENS = "tokens"  # in Objective.needs: the embeddings of regions and words too
WORDS = "words"  # in Objective.needs: which word each word piece belongs to


class Features(NamedTuple):
    """Embeddings of a batch, from the model that trains or, as anchors without gradient, from the global one."""

    image: Tensor
    """(B, D) fp32, unit norm; for an Objective that takes_head_outputs as they leave the head, in training."""
    text: Tensor
    """(B, D), likewise."""
    image_tokens: Tensor | None = None
    """(B, R, D): every region through the image head; only where an objective needs TOKENS."""
    text_tokens: Tensor | None = None
    """(B, T, D): every word piece through the text head; only where an objective needs TOKENS."""
    text_mask: Tensor | None = None
    """(B, T), 1 for a word piece, 0 for padding; beside text_tokens."""
    text_ids: Tensor | None = None
    """(B,) int64, equal where two pairs have the same report; None for anchors."""
    words: Tensor | None = None
    """(B, T) int64: the number of each piece's word in its text, −1 for special tokens and padding; only where an
    objective needs WORDS, and None for anchors."""
    kept: Tensor | None = None
    """(B, Objective.num_kept) fp32, a constant: what the objective has kept of each pair, NaN for pairs that were never
    met; None for anchors, and where it keeps nothing."""
    temperature: Tensor | float = 0.07
    """τ: a number, or fp32 (1,) with a gradient where it is learned."""
    learned: tuple[Tensor, ...] = ()
    """fp32, what the objective learns itself (Objective.learned); none for anchors."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Features:
        """`change` applied to every field that has a row a pair; the temperature stays, and what is learned."""
        rows: dict[str, Any] = {name: getattr(self, name) for name in ROWS}
        changed: dict[str, Any] = {name: None if x is None else change(x) for name, x in rows.items()}
        return self._replace(**changed)

    def rows(self, part: slice) -> Features:
        """The features of some of the pairs."""
        return self.each(lambda x: x[part])

    def gathered(self, group: dist.ProcessGroup | None) -> Features:
        """The features of the whole batch, that of every rank of the client, by rank: for a loss that each rank computes whole.

        Each rank's embeddings then receive their rows of the gradient, and the temperature this rank's share.
        """
        if group is None:
            return self
        from feddra_ds.distributed.collectives import gather, group_size, scale_gradient

        whole = _padded_alike(self, group).each(lambda x: gather(x, group, "slice"))
        share = 1 / group_size(group)
        temperature = self.temperature
        if not isinstance(temperature, float):
            temperature = scale_gradient(temperature, share)
        return whole._replace(temperature=temperature, learned=tuple(scale_gradient(x, share) for x in self.learned))

    def tensors(self) -> dict[tuple[str, int], Tensor]:
        """Every tensor by its field's name and, in `learned`, its place there (else 0)."""
        out = {}
        for name, value in self._asdict().items():
            for place, x in enumerate(value if isinstance(value, tuple) else (value,)):
                if x is not None and not isinstance(x, float):
                    out[name, place] = x
        return out

    def with_tensors(self, tensors: Mapping[tuple[str, int], Tensor]) -> Features:
        """These features with other tensors in the places of `tensors()`."""
        changed: dict[str, Any] = {name: x for (name, _), x in tensors.items() if name != "learned"}
        return self._replace(**changed, learned=tuple(tensors["learned", i] for i in range(len(self.learned))))


ROWS = tuple(name for name in Features._fields if name not in ("temperature", "learned"))  # fields with a row a pair


def _padded_alike(features: Features, group: dist.ProcessGroup) -> Features:
    """Texts padded to the longest of any rank: each rank pads its own part of the batch."""
    tokens, mask = features.text_tokens, features.text_mask
    if tokens is None or mask is None:
        return features
    from torch.nn.functional import pad

    from feddra_ds.distributed.collectives import gather_ints

    missing = max(length for (length,) in gather_ints([tokens.shape[1]], group, tokens.device)) - tokens.shape[1]
    words = None if features.words is None else pad(features.words, (0, missing), value=-1)
    return features._replace(
        text_tokens=pad(tokens, (0, 0, 0, missing)), text_mask=pad(mask, (0, missing)), words=words
    )


def join(parts: Sequence[Features]) -> Features:
    """The features of consecutive micro-batches as those of the batch."""
    import torch

    columns: dict[str, list[Any]] = {name: [getattr(part, name) for part in parts] for name in ROWS}
    whole: dict[str, Any] = {name: None if x[0] is None else torch.cat(x) for name, x in columns.items()}
    return parts[-1]._replace(**whole)
