"""An image of any format that a source may bring becomes a JPEG or PNG for a shard, without any metadata."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from feddra_ds.common.errors import DataError
from feddra_ds.data.loading.images import MAX_PIXELS, WIDE_MODES, BadSample, orientation, stretch, to_rgb
from feddra_ds.data.sources.dicom import DicomError, Scaled, is_dicom, read_dicom

_READABLE = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")


class Encoded(NamedTuple):
    """An image for a shard: its bytes, their suffix, and how grey of more than 8 bits came to 8, where it did."""

    data: bytes
    suffix: str
    scaled: Scaled | None = None


def encode_image(data: bytes, shorter_side: int | None, frame: int | None = None) -> Encoded:
    """A checked image: the JPEG or PNG itself where nothing has to change, else encoded anew, without any metadata.

    Larger images are shrunk to `shorter_side`, photographs turned upright, other formats become PNG, DICOM among them, of
    which `frame` chooses one of several. Raises BadSample, and DicomError, a ValueError.
    """
    scaled: Scaled | None = None
    try:
        if is_dicom(data):
            picture, scaled = read_dicom(data, frame)
            plain = io.BytesIO()
            picture.save(plain, "PNG", compress_level=1)
            data = plain.getvalue()
        opened = Image.open(io.BytesIO(data), formats=_READABLE)
        if opened.width * opened.height > MAX_PIXELS:
            raise BadSample("oversized_image")
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(opened.format or "", "")
        upright = orientation(opened) == 1
        shrink = shorter_side is not None and min(opened.size) > shorter_side
        opened.load()
        if suffix and upright and not shrink:
            return Encoded(data, suffix, scaled)
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode in WIDE_MODES:
            grey, clipped = stretch(np.asarray(image))
            image, scaled = Image.fromarray(grey), Scaled("percentiles", clipped)
    except Image.DecompressionBombError as error:
        raise BadSample("oversized_image") from error
    except (BadSample, DicomError, DataError):
        raise
    except Exception as error:  # Pillow raises many types for broken files
        raise BadSample("corrupt_image") from error
    if image.mode not in ("L", "RGB"):
        image = image.convert("L") if image.mode == "1" else to_rgb(image)
    if shrink and shorter_side is not None:
        scale = shorter_side / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if suffix == "jpg":
        image.info.clear()
        image.save(out, "JPEG", quality=92)
        return Encoded(out.getvalue(), "jpg", scaled)
    image.info.clear()  # Pillow would write comments and EXIF again
    image.save(out, "PNG")
    return Encoded(out.getvalue(), "png", scaled)
