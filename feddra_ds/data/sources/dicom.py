"""DICOM pictures as 8 bits a channel: pydicom decodes and applies the lookup tables, only pixels come out of here.

Legend: h, w rows and columns of the picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from feddra_ds.data.loading.images import stretch
from feddra_ds.data.sources.base import needed


class DicomError(ValueError):
    """A DICOM file that gives no picture; the message says why and what to do."""


@dataclass(frozen=True)
class Scaled:
    """How a picture came to 8 bits: by `window` (the file's own, or its lookup table) or `percentiles`; the share of
    its pixels that were clipped to black or white, 0 to 1."""

    how: str
    clipped: float


def is_dicom(data: bytes) -> bool:
    """Whether bytes are a DICOM file: its preamble, or a first group that only DICOM begins with."""
    return data[128:132] == b"DICM" or data[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x08\x00\x16\x00")


def read_dicom(data: bytes, frame: int | None = None) -> tuple[Image.Image, Scaled | None]:
    """The picture, grey (L) or colour (RGB), and how grey came to 8 bits. frame: which of several, from 0.

    Grey values pass the modality's rescale or table, then the file's VOI window or table (PS3.3 C.11.2), whose output range
    becomes 0..255; without one, percentiles are stretched (`images.stretch`), the same for 8, 12 and 16 bits. MONOCHROME1
    is inverted. Raises DicomError.
    """
    pydicom = needed("pydicom", "a DICOM picture", "dicom")
    try:
        ds = pydicom.dcmread(io.BytesIO(data), force=True)
    except Exception as error:  # pydicom raises many types for broken files
        raise DicomError(f"is not a whole DICOM file: {error}") from error
    if "Rows" not in ds or not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DicomError("is a DICOM file without pixels")
    values = _decode(ds, frame)
    if values.ndim == 3:
        return Image.fromarray(_eight_bits(values, int(ds.BitsStored))), None
    return _grey(ds, values)


def _decode(ds: Any, frame: int | None) -> np.ndarray:
    """(h, w) stored values, or (h, w, 3) RGB. Raises DicomError."""
    pixels = needed("pydicom.pixels", "a DICOM picture", "dicom")
    count = int(ds.get("NumberOfFrames") or 1)
    if count > 1 and frame is None:
        raise DicomError(f"has {count} frames; choose one with --frame, which counts from 0")
    if frame is not None and frame >= count:
        raise DicomError(f"has {count} frames, no frame {frame}")
    syntax = getattr(ds, "file_meta", {}).get("TransferSyntaxUID")
    try:
        if syntax is None:  # a file without its header is taken for the commonest, which pydicom has read it as
            ds.ensure_file_meta()
            ds.file_meta.TransferSyntaxUID = needed("pydicom.uid", "a DICOM picture", "dicom").ImplicitVRLittleEndian
        values = np.asarray(pixels.pixel_array(ds, index=frame or 0))
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            values = np.asarray(pixels.apply_color_lut(values, ds))
            ds.BitsStored = 8 * values.dtype.itemsize
            return values[..., :3]
        return values
    except Exception as error:  # a missing plugin, a cut file, a value that makes no sense
        name = getattr(syntax, "name", "no transfer syntax")
        raise DicomError(f"cannot be decoded ({name}): {' '.join(str(error).split())}") from error


def _grey(ds: Any, values: np.ndarray) -> tuple[Image.Image, Scaled]:
    """values: (h, w) as stored."""
    pixels = needed("pydicom.pixels", "a DICOM picture", "dicom")
    padding = ds.get("PixelPaddingValue")
    valid = None if padding is None or "PixelPaddingRangeLimit" in ds else values != padding
    try:
        rescaled = np.asarray(pixels.apply_modality_lut(values, ds))
    except Exception as error:
        raise DicomError(f"has a rescale or a modality table that cannot be applied: {error}") from error
    shown = _windowed(pixels, ds, rescaled)
    if shown is not None:
        grey, how = shown, "window"
        clipped = float(np.mean((grey == 0) | (grey == 255))) if grey.size else 0.0
    else:
        grey, clipped = stretch(rescaled, valid)
        how = "percentiles"
    if ds.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey), Scaled(how, clipped)


def _windowed(pixels: Any, ds: Any, values: np.ndarray) -> np.ndarray | None:
    """(h, w) uint8 by the file's own window or VOI table; None where it has none, or one that makes no sense."""
    if "VOILUTSequence" not in ds and ("WindowCenter" not in ds or "WindowWidth" not in ds):
        return None
    try:
        shown = np.asarray(pixels.apply_voi_lut(values, ds), dtype=np.float64)
        if "VOILUTSequence" in ds:
            low, high = 0.0, 2.0 ** int(ds.VOILUTSequence[0].LUTDescriptor[2]) - 1
        else:  # what the window makes of black and of white, whatever its output range
            with np.errstate(over="ignore"):
                low, high = np.asarray(pixels.apply_voi_lut(np.array([-1e12, 1e12]), ds), dtype=np.float64)
        if low == high:
            return None
        return ((shown - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
    except Exception:  # an empty window, a width of 0: as if there were none
        return None


def _eight_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return (
        values.astype(np.uint8) if bits <= 8 else (values.astype(np.float64) * (255 / (2**bits - 1))).astype(np.uint8)
    )
