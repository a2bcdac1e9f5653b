"""Pictures that look alike though their bytes differ: the same one, saved anew, shrunk or brightened.

Legend: n pictures, T = 32 the side of a thumbnail.

A perceptual hash of 63 bits (signs of the low frequencies of a thumbnail's cosine transform, each against their median)
finds candidates; what remains of two thumbnails without their blur must then agree, because radiographs of different
people have much the same low frequencies.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from feddra_ds.data.loading.images import open_image, to_rgb

_SIDE = 32
_MAX_BITS = 10  # of 63 that may differ
_MIN_DETAIL = 0.92  # correlation of the details: radiographs saved anew have 0.99, those of two people 0.85 at most
_BLOCK = 1024


def thumbnail(data: bytes) -> np.ndarray:
    """(T, T) float32 grey of an encoded picture. Raises BadSample."""
    image = open_image(data)
    if image.format == "JPEG":
        image.draft("L", (4 * _SIDE, 4 * _SIDE))
    grey = to_rgb(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32)


def alike(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Pairs i < j of pictures that look alike, of (n, T, T) thumbnails; each j is paired with its first i only."""
    if len(thumbnails) < 2:
        return []
    hashes, details = _hashes(thumbnails), _details(thumbnails)
    pairs: dict[int, int] = {}
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        # equal bits: (63 + sum of products of ±1) / 2
        different = (hashes.shape[1] - block @ hashes.T) / 2
        for one, other in np.argwhere(different <= _MAX_BITS).tolist():
            first = start + one
            if first < other and other not in pairs and float(np.sum(details[first] * details[other])) >= _MIN_DETAIL:
                pairs[other] = first
    return [(first, other) for other, first in sorted(pairs.items())]


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(n, 63) float32 of ±1."""
    place, frequency = np.arange(_SIDE), np.arange(8)[:, None]
    cosines = np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)).astype(np.float32)
    low = (cosines @ thumbnails @ cosines.T).reshape(len(thumbnails), -1)[:, 1:]  # without the mean brightness
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32)


def _details(thumbnails: np.ndarray) -> np.ndarray:
    """(n, T, T) float32: the thumbnails less their blur of 5 × 5, of unit norm; 0 for a flat picture."""
    padded = np.pad(thumbnails, ((0, 0), (2, 2), (2, 2)), mode="edge")
    rows = np.sum([padded[:, shift : shift + _SIDE] for shift in range(5)], axis=0)
    blur = np.sum([rows[:, :, shift : shift + _SIDE] for shift in range(5)], axis=0) / 25
    details = thumbnails - blur
    norm = np.sqrt((details**2).sum(axis=(1, 2), keepdims=True))
    return np.divide(details, norm, out=np.zeros_like(details), where=norm > 1e-3)
