"""Retrieval as ranks: recall and its chance level.

Legend: n pairs in the gallery, D embedding size, k rank cut-off, m positives of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)
_ROWS = 512  # of the similarity matrix held at a time

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """How each query of a gallery fared. Arrays are (n,).

    i2t[j]: distinct texts, other than its own, at least as similar to image j as its own (a tie counts against the
    match): copies of a text share an embedding, so they are one entry of the gallery. t2i[j]: images of other texts, at
    least as similar to text j as the best of its own. positives[j]: pairs whose text is that of pair j, itself included.
    """

    i2t: Ints
    t2i: Ints
    positives: Ints

    def __len__(self) -> int:
        return len(self.positives)

    @property
    def num_texts(self) -> int:
        """Distinct texts."""
        return round(float((1 / self.positives).sum()))

    @property
    def cutoffs(self) -> list[int]:
        """The k for which recall says something: those below the number of distinct texts."""
        return [k for k in RECALL_AT if k < self.num_texts]

    def hits(self, direction: str, k: int) -> NDArray[np.float64]:
        """(n,) 1.0 where a positive is among the k best. direction: i2t, t2i or mean (of both)."""
        both = {"i2t": [self.i2t], "t2i": [self.t2i], "mean": [self.i2t, self.t2i]}[direction]
        return np.mean([rank < k for rank in both], axis=0, dtype=np.float64)

    def chance(self, k: int) -> NDArray[np.float64]:
        """(n,) probability that a random order puts a positive among the first k, the mean of both directions."""
        from scipy.stats import hypergeom  # late: its import takes most of a second

        positives, which = np.unique(self.positives, return_inverse=True)
        missed = hypergeom.pmf(0, len(self), positives, k)  # no positive among k draws without return
        return (min(1.0, k / self.num_texts) + (1 - missed[which])) / 2


def ranks(image: NDArray[np.floating], text: NDArray[np.floating], text_ids: Ints) -> Ranks:
    """Rank a gallery of pairs: image and text (n, D), unit norm; text_ids (n,), equal for identical texts."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    sides = []
    _, first = np.unique(text_ids, return_index=True)  # one entry per distinct text
    for queries, gallery, ids in ((image, text[first], text_ids[first]), (text, image, text_ids)):
        better = [
            _better(queries[i : i + _ROWS] @ gallery.T, text_ids[i : i + _ROWS, None] == ids[None])
            for i in range(0, len(text_ids), _ROWS)
        ]
        sides.append(np.concatenate(better) if better else np.zeros(0, dtype=np.int64))
    _, inverse, counts = np.unique(text_ids, return_inverse=True, return_counts=True)
    return Ranks(sides[0], sides[1], counts[inverse].astype(np.int64))


def recall_table(found: Ranks) -> dict[str, float]:
    """i2t_recall@k, t2i_recall@k, chance@k for k below the number of texts, and pairs: the keys of metrics.jsonl's val."""
    out: dict[str, float] = {}
    for direction in ("i2t", "t2i"):
        out |= {f"{direction}_recall@{k}": float(found.hits(direction, k).mean()) for k in found.cutoffs}
    out |= {f"chance@{k}": float(found.chance(k).mean()) for k in found.cutoffs}
    return out | {"pairs": len(found)}


def _better(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> Ints:
    best = np.where(same, scores, -np.inf).max(1)
    return (np.where(same, -np.inf, scores) >= best[:, None]).sum(1)
