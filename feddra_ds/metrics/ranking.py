"""Retrieval as ranks: recall, average precision and chance levels.

Legend: n pairs in the gallery, T distinct texts, D embedding size, k rank cut-off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
_ROWS = 512  # of the similarity matrix held at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """How each query of one direction fared. Arrays are (n,).

    better: wrong entries of the gallery that are at least as similar as the best match (a tie counts against the match).
    precision: average precision over the query's matches. matches: their number, the query's own included. gallery: entries
    that are searched.
    """

    better: Ints
    precision: Floats
    matches: Ints
    gallery: int

    def chance(self, k: int) -> Floats:
        """(n,) probability that a random order puts a match among the first k."""
        from scipy.stats import hypergeom  # late: its import takes most of a second

        matches, which = np.unique(self.matches, return_inverse=True)
        missed = hypergeom.pmf(0, self.gallery, matches, k)  # no match among k draws without return
        return np.where(matches == 1, min(1.0, k / self.gallery), 1 - missed)[which]


@dataclass(frozen=True)
class Ranks:
    """How the pairs of a gallery fared, both ways.

    i2t: each image searches the distinct texts, as copies of a text share an embedding. t2i: each pair's text searches all
    images.
    """

    i2t: Side
    t2i: Side

    def __len__(self) -> int:
        return len(self.i2t.better)

    @property
    def num_texts(self) -> int:
        """Distinct texts."""
        return self.i2t.gallery

    @property
    def cutoffs(self) -> list[int]:
        """The k for which recall says something: those below the number of distinct texts."""
        return [k for k in RECALL_AT if k < self.num_texts]

    def hits(self, direction: str, k: int) -> Floats:
        """(n,) 1.0 where a match is among the k best. direction: i2t, t2i or mean (of both)."""
        both = {"i2t": [self.i2t], "t2i": [self.t2i], "mean": [self.i2t, self.t2i]}[direction]
        return np.mean([side.better < k for side in both], axis=0, dtype=np.float64)

    def chance(self, k: int) -> Floats:
        """(n,) probability that a random order puts a match among the first k, the mean of both directions."""
        return (self.i2t.chance(k) + self.t2i.chance(k)) / 2


def ranks(
    image: NDArray[np.floating], text: NDArray[np.floating], text_ids: Ints, match_ids: Ints | None = None
) -> Ranks:
    """Rank a gallery of pairs: image and text (n, D), unit norm; text_ids (n,), equal for identical texts.

    match_ids: (n,), equal from 0 on for pairs whose pictures and texts match each other too, such as those of one study;
    -1 (and None) for none. What is not finite matches nothing: as a query it finds its match last, and it is found last.
    """
    _, first, which = np.unique(text_ids, return_index=True, return_inverse=True)
    images: Floats = image.astype(np.float64)
    texts: Floats = text[first].astype(np.float64)
    match = _matches(which, len(first), match_ids)
    by_text = _search(texts, images, match.T.tocsr())
    of_pairs = Side(by_text.better[which], by_text.precision[which], by_text.matches[which], len(images))
    return Ranks(_search(images, texts, match), of_pairs)


def recall_table(found: Ranks) -> dict[str, float]:
    """i2t_recall@k, t2i_recall@k, chance@k for k below the number of texts, and pairs: the keys of metrics.jsonl's val."""
    out: dict[str, float] = {}
    for direction in DIRECTIONS:
        out |= {f"{direction}_recall@{k}": float(found.hits(direction, k).mean()) for k in found.cutoffs}
    out |= {f"chance@{k}": float(found.chance(k).mean()) for k in found.cutoffs}
    return out | {"pairs": len(found)}


def rank_table(found: Ranks) -> dict[str, float]:
    """i2t_median_rank, t2i_median_rank (from 1, of the best match), i2t_map and t2i_map (mean average precision)."""
    sides = {"i2t": found.i2t, "t2i": found.t2i}
    out = {f"{name}_median_rank": float(np.median(side.better) + 1) for name, side in sides.items()}
    return out | {f"{name}_map": float(side.precision.mean()) for name, side in sides.items()}


def _matches(which: Ints, num_texts: int, match_ids: Ints | None) -> csr_array:
    """(n, T): whether an image matches a text: its own, and those of the pairs that share its match id."""
    from scipy.sparse import csr_array  # late: its import takes a while

    n = len(which)
    own = csr_array((np.ones(n), (np.arange(n), which)), shape=(n, num_texts))
    if match_ids is None or not (match_ids >= 0).any():
        return own
    rows = np.flatnonzero(match_ids >= 0)
    group = csr_array((np.ones(len(rows)), (rows, match_ids[rows])), shape=(n, int(match_ids.max()) + 1))
    return csr_array(own + group @ (group.T @ own))


def _search(queries: Floats, gallery: Floats, match: csr_array) -> Side:
    """queries (q, D), gallery (g, D), match (q, g)."""
    better, precision, matches = [], [], []
    for i in range(0, len(queries), _ROWS):
        with np.errstate(invalid="ignore", over="ignore"):
            scores = queries[i : i + _ROWS] @ gallery.T
        scores = np.where(np.isfinite(scores), scores, -np.inf)
        right = match[i : i + _ROWS].toarray() > 0
        best = np.where(right, scores, -np.inf).max(1)
        better.append(((scores >= best[:, None]) & ~right).sum(1))
        matches.append(right.sum(1))
        precision.append(1 / (1.0 + better[-1]))
        for row in np.flatnonzero(matches[-1] > 1):
            precision[-1][row] = _average_precision(scores[row], right[row])
    if not better:
        return Side(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), len(gallery))
    return Side(np.concatenate(better), np.concatenate(precision), np.concatenate(matches), len(gallery))


def _average_precision(scores: Floats, right: NDArray[np.bool_]) -> float:
    found, wrong = np.sort(scores[right])[::-1], np.sort(scores[~right])
    place = np.arange(1, len(found) + 1)
    return float(np.mean(place / (place + len(wrong) - np.searchsorted(wrong, found))))
