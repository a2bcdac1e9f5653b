"""How embeddings lie on the sphere: alignment, uniformity and the gap between pictures and texts.

Legend: n pairs, D embedding size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROWS = 512  # of the matrix of distances held at a time


def geometry(image: NDArray[np.floating], text: NDArray[np.floating]) -> dict[str, float] | None:
    """Of pairs (n, D), unit norm, those that are not finite left out; None for fewer than two.

    alignment: mean squared distance of a pair; image_uniformity and text_uniformity: log of the mean over two different
    rows of exp(−2 ‖x − y‖²) (Wang and Isola 2020, α = 2, t = 2; less is better for both). modality_gap: distance of the
    mean picture from the mean text (Liang et al. 2022).
    """
    finite = np.isfinite(image).all(1) & np.isfinite(text).all(1)
    x, y = image[finite].astype(np.float64), text[finite].astype(np.float64)
    if len(x) < 2:
        return None
    return {
        "alignment": float(((x - y) ** 2).sum(1).mean()),
        "image_uniformity": _uniformity(x),
        "text_uniformity": _uniformity(y),
        "modality_gap": float(np.linalg.norm(x.mean(0) - y.mean(0))),
    }


def _uniformity(x: NDArray[np.float64]) -> float:
    squares, total = (x**2).sum(1), 0.0
    for i in range(0, len(x), _ROWS):
        distances = squares[i : i + _ROWS, None] + squares[None] - 2 * x[i : i + _ROWS] @ x.T
        total += float(np.exp(-2 * np.maximum(distances, 0)).sum())
    return float(np.log((total - len(x)) / (len(x) * (len(x) - 1))))  # less the distances of rows to themselves
