"""Images: encoded bytes → uint8 pixels. The evaluation transform equals transformers' ViT image processor (PIL).

Legend: S side of the square image. Pixels are (3, S, S) uint8; batch.Batch normalises them.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageOps

from feddra_ds.config.schema import AugmentConfig
from feddra_ds.data.loading.order import seeded

# Pillow's own threshold for a decompression bomb; a 4,096 × 5,120 mammogram is a quarter of it.
MAX_PIXELS = 89_478_485
_PERCENTILES = (1, 99)
_EXIF_ORIENTATION = 0x0112
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


class BadSample(Exception):
    """A sample that cannot be used; `reason` is one of REASONS; metrics count by it."""

    def __init__(self, reason: str):
        assert reason in REASONS, reason
        self.reason = reason
        super().__init__(reason)


REASONS = (
    "missing_image",
    "corrupt_image",
    "oversized_image",
    "missing_text",
    "empty_text",
    "no_report",
    "git_lfs_pointer",
    "corrupt_text",
    "truncated_shard",
)


def open_image(data: bytes) -> Image.Image:
    """A lazily opened JPEG, PNG or WebP. Raises BadSample (corrupt_image, oversized_image)."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError as error:
        raise BadSample("oversized_image") from error
    except Exception as error:  # Pillow raises many types for broken headers, SyntaxError and struct.error among them
        raise BadSample("corrupt_image") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("oversized_image")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, upright by its EXIF orientation. 16-bit and float grey images are scaled by `stretch`.

    Pillow's own conversion would clip them to white. Raises BadSample for an image that does not decode.
    """
    try:
        if orientation(image) > 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in WIDE_MODES:
            image = Image.fromarray(stretch(np.asarray(image))[0])
        return image.convert("RGB")
    except Exception as error:
        raise BadSample("corrupt_image") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or none that makes sense. From 5 on sides are swapped."""
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises many types for broken EXIF, which says nothing of the picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def stretch(values: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Grey values of any depth (h, w) as uint8: their 1st percentile becomes 0, their 99th 255. Also the share clipped.

    Percentiles, because a burnt-in marker of 65535 would leave the picture itself nearly black. Where they are equal,
    minimum and maximum take their place. valid: (h, w) bool, the pixels that count; others, and those that are not
    finite, do not.
    """
    values = np.asarray(values, dtype=np.float64)
    counts = np.isfinite(values) if valid is None else np.isfinite(values) & valid
    kept = values[counts]
    if not kept.size:
        return np.zeros(values.shape, dtype=np.uint8), 0.0
    low, high = np.percentile(kept, _PERCENTILES)
    if low == high:
        low, high = kept.min(), kept.max()
    if low == high:
        return np.zeros(values.shape, dtype=np.uint8), 0.0
    clipped = float(np.mean((kept < low) | (kept > high)))
    scaled = np.nan_to_num((values - low) * (255.0 / (high - low)), nan=0.0, posinf=255.0, neginf=0.0)
    return scaled.round().clip(0, 255).astype(np.uint8), clipped


def evaluation_pixels(data: bytes, size: int) -> np.ndarray:
    """(3, S, S) uint8: RGB, resized to S × S, bilinear with antialiasing. Raises BadSample."""
    image = to_rgb(open_image(data)).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def training_pixels(data: bytes, size: int, augment: AugmentConfig, *seed: object) -> np.ndarray:
    """(3, S, S) uint8: a random crop by augment.method, mirror image, brightness and contrast, all set by `seed`.

    Raises BadSample.
    """
    draw = np.frombuffer(seeded("augment", *seed), dtype=np.uint64) / 2.0**64  # (8,) uniform in [0, 1)
    crop = _pad_crop if augment.method == "pad_crop" else _resized_crop
    pixels = crop(open_image(data), size, augment, draw)
    if augment.flip and draw[4] < 0.5:
        pixels = pixels[:, ::-1]
    if augment.brightness:
        brightness, contrast = 1 + augment.brightness * (2 * draw[5:7] - 1)
        centre = pixels.mean()
        table = brightness * (centre + contrast * (np.arange(256) - centre))
        pixels = table.round().clip(0, 255).astype(np.uint8)[pixels]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _upright(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height as stored in those of the upright picture, or the other way round."""
    return (size[1], size[0]) if orientation(image) >= 5 else size


def _pad_crop(image: Image.Image, size: int, augment: AugmentConfig, draw: np.ndarray) -> np.ndarray:
    """(S, S, 3): the longer side to augment.resize, black borders around it to a square, and a random crop of that."""
    square = augment.resize
    scale = square / max(image.size)
    width, height = (max(1, round(side * scale)) for side in _upright(image, image.size))
    if image.format == "JPEG":
        image.draft(None, _upright(image, (width, height)))
    pixels = np.zeros((square, square, 3), dtype=np.uint8)
    left, top = (square - width) // 2, (square - height) // 2
    whole = np.asarray(to_rgb(image).resize((width, height), Image.Resampling.BILINEAR))
    pixels[top : top + height, left : left + width] = whole
    x, y = (int(d * (square - size + 1)) for d in draw[2:4])
    return pixels[y : y + size, x : x + size]


def _resized_crop(image: Image.Image, size: int, augment: AugmentConfig, draw: np.ndarray) -> np.ndarray:
    """(S, S, 3): a random part of at least augment.crop_scale of the area, stretched to the square."""
    area = augment.crop_scale + (1 - augment.crop_scale) * draw[0]
    # Within these ratios neither side of the crop exceeds the image's.
    low, high = math.log(max(3 / 4, area)), math.log(min(4 / 3, 1 / area))
    ratio = math.exp(low + (high - low) * draw[1])
    part_w, part_h = math.sqrt(area * ratio), math.sqrt(area / ratio)

    if image.format == "JPEG":  # decodes at 1/2, 1/4 or 1/8 where the crop keeps S pixels a side
        image.draft(None, _upright(image, (math.ceil(size / part_w), math.ceil(size / part_h))))
    image = to_rgb(image)
    width, height = image.width * part_w, image.height * part_h
    left, top = (image.width - width) * draw[2], (image.height - height) * draw[3]
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
