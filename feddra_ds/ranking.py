"""Retrieval as ranks (pure NumPy): recall, its chance level, and how sure one may be of it.

Legend: n pairs in the gallery, D embedding size, k rank cut-off, m positives of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)
_ROWS = 512  # of the similarity matrix held at a time

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """How each query of a gallery fared. Arrays are (n,).

    i2t[j]: texts that are no positive of image j and at least as similar to it as its best positive (a tie counts
    against the match); t2i likewise. positives[j]: pairs whose text is that of pair j, itself included.
    """

    i2t: Ints
    t2i: Ints
    positives: Ints

    def __len__(self) -> int:
        return len(self.positives)

    @property
    def cutoffs(self) -> list[int]:
        """The k for which recall says something: those below n."""
        return [k for k in RECALL_AT if k < len(self)]

    def hits(self, direction: str, k: int) -> NDArray[np.float64]:
        """(n,) 1.0 where a positive is among the k best. direction: i2t, t2i or mean (of both)."""
        both = {"i2t": [self.i2t], "t2i": [self.t2i], "mean": [self.i2t, self.t2i]}[direction]
        return np.mean([rank < k for rank in both], axis=0, dtype=np.float64)

    def chance(self, k: int) -> NDArray[np.float64]:
        """(n,) probability that a random order puts a positive among the first k."""
        return np.array([1 - _miss(len(self), int(m), k) for m in self.positives])


def ranks(image: NDArray[np.floating], text: NDArray[np.floating], text_ids: Ints) -> Ranks:
    """Rank a gallery of pairs: image and text (n, D), unit norm; text_ids (n,), equal for identical texts."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    sides = []
    for queries, gallery in ((image, text), (text, image)):
        better = [
            _better(queries[i : i + _ROWS] @ gallery.T, text_ids[i : i + _ROWS, None] == text_ids[None])
            for i in range(0, len(text_ids), _ROWS)
        ]
        sides.append(np.concatenate(better) if better else np.zeros(0, dtype=np.int64))
    _, inverse, counts = np.unique(text_ids, return_inverse=True, return_counts=True)
    return Ranks(sides[0], sides[1], counts[inverse].astype(np.int64))


def recall_table(found: Ranks) -> dict[str, float]:
    """i2t_recall@k, t2i_recall@k and chance@k for k in RECALL_AT below n, and pairs: the keys of metrics.jsonl's val."""
    out: dict[str, float] = {}
    for direction in ("i2t", "t2i"):
        out |= {f"{direction}_recall@{k}": float(found.hits(direction, k).mean()) for k in found.cutoffs}
    out |= {f"chance@{k}": float(found.chance(k).mean()) for k in found.cutoffs}
    return out | {"pairs": len(found)}


def bootstrap(
    values: NDArray[np.float64], groups: Sequence[object], *, draws: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n,), resampling whole groups: pairs of one patient or of one text
    are no independent evidence. groups: n keys. Raises ValueError for no values or no draws."""
    if len(values) == 0 or draws < 1:
        raise ValueError(f"bootstrap: needs values and draws, got {len(values)} values and {draws} draws")
    _, member = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(len(sums), size=len(sums))
        means[draw] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _better(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> Ints:
    best = np.where(same, scores, -np.inf).max(1)
    return (np.where(same, -np.inf, scores) >= best[:, None]).sum(1)


@lru_cache(maxsize=4096)
def _miss(n: int, positives: int, k: int) -> float:
    """Probability that k draws of n without return hit none of the positives."""
    miss = 1.0
    for j in range(k):
        miss *= max(0, n - positives - j) / (n - j)
    return miss
