"""DICOM of each kind, from pydicom's own test files: the pixels are pydicom's, and nothing else gets into a shard."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from feddra_ds.cli import main
from feddra_ds.config.schema import AugmentConfig
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.format.likeness import thumbnail
from feddra_ds.data.loading.images import evaluation_pixels, open_image, stretch, to_rgb, training_pixels
from feddra_ds.data.sources.dicom import DicomError, is_dicom, read_dicom
from feddra_ds.data.sources.encode import encode_image


def file_of(name: str) -> bytes:
    return Path(get_testdata_file(name, download=False)).read_bytes()


def changed(name: str, **values: object) -> bytes:
    """One of pydicom's files with other values of some elements; None takes one out."""
    ds = pydicom.dcmread(io.BytesIO(file_of(name)))
    for key, value in values.items():
        if value is not None:
            setattr(ds, key, value)
        elif key in ds:
            delattr(ds, key)
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def by_pydicom(data: bytes) -> np.ndarray:
    """(h, w) uint8 by pydicom's VOI LUT, whose output range of 16 signed or unsigned bits becomes 0..255."""
    ds = pydicom.dcmread(io.BytesIO(data))
    shown = apply_voi_lut(apply_modality_lut(pixel_array(ds), ds), ds).astype(float)
    bits, signed = int(ds.BitsStored), int(ds.PixelRepresentation)
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    low = -(2 ** (bits - 1)) * signed * slope + intercept
    high = (2 ** (bits - signed) - 1) * slope + intercept
    return ((shown - low) / (high - low) * 255).round().astype(np.uint8)


WINDOWED = {
    "MR, its own window": file_of("MR_small.dcm"),
    "MR, RLE": file_of("MR_small_RLE.dcm"),
    "MR, JPEG 2000": file_of("MR_small_jp2klossless.dcm"),
    "MR, big endian": file_of("MR_small_bigendian.dcm"),
    "CT, rescaled and windowed": changed("CT_small.dcm", WindowCenter=40, WindowWidth=400),
    "CT, sigmoid": changed("CT_small.dcm", WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID"),
}


@pytest.mark.parametrize("data", WINDOWED.values(), ids=WINDOWED)
def test_pixels_are_those_of_pydicom_s_own_window(data: bytes) -> None:
    image, scaled = read_dicom(data)
    expected = by_pydicom(data)
    assert expected.std() > 20
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    assert scaled is not None
    assert scaled.how == "window"
    encoded = encode_image(data, None)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded.data))), np.asarray(image))


def test_without_a_window_percentiles_scale_and_monochrome1_is_inverted() -> None:
    data = changed("CT_small.dcm", WindowCenter=None, WindowWidth=None)
    image, scaled = read_dicom(data)
    grey = np.asarray(image).astype(int)
    assert scaled is not None
    assert (scaled.how, grey.min(), grey.max()) == ("percentiles", 0, 255)
    assert 0 < scaled.clipped <= 0.02
    inverted = np.asarray(read_dicom(changed("CT_small.dcm", PhotometricInterpretation="MONOCHROME1"))[0]).astype(int)
    upright = np.asarray(read_dicom(file_of("CT_small.dcm"))[0]).astype(int)
    assert np.array_equal(inverted, 255 - upright)
    no_window = changed("MR_small.dcm", WindowWidth=0)
    assert read_dicom(no_window)[1].how == "percentiles", "a window of width 0 is none"


@pytest.mark.parametrize(
    "name", ["SC_rgb_rle.dcm", "examples_rgb_color.dcm", "examples_ybr_color.dcm", "examples_palette.dcm"]
)
def test_colour(name: str) -> None:
    frames = int(pydicom.dcmread(io.BytesIO(file_of(name))).get("NumberOfFrames") or 1)
    image, scaled = read_dicom(file_of(name), 0 if frames > 1 else None)
    assert (image.mode, scaled) == ("RGB", None)
    assert np.asarray(image).std() > 10


@pytest.mark.parametrize(
    ("data", "frame", "message"),
    [
        (file_of("SC_rgb_rle_2frame.dcm"), None, "has 2 frames; choose one with --frame"),
        (file_of("SC_rgb_rle_2frame.dcm"), 2, "has 2 frames, no frame 2"),
        (file_of("rtplan.dcm"), None, "without pixels"),
        (file_of("MR_small.dcm")[:3000], None, "cannot be decoded"),
    ],
    ids=["several frames", "no such frame", "a plan", "cut off"],
)
def test_what_gives_no_picture_says_why(data: bytes, frame: int | None, message: str) -> None:
    assert is_dicom(data)
    with pytest.raises(DicomError, match=message):
        encode_image(data, None, frame)


def test_a_frame_can_be_chosen() -> None:
    data = file_of("SC_rgb_rle_2frame.dcm")
    first, second = (np.asarray(read_dicom(data, frame)[0]) for frame in (0, 1))
    assert not np.array_equal(first, second)


def test_no_identifying_tag_reaches_a_shard(tmp_path: Path, capsys) -> None:
    lines = ["image,text"]
    for n in range(6):
        ds = pydicom.dcmread(io.BytesIO(file_of("MR_small.dcm")))
        ds.PatientName, ds.PatientID, ds.InstitutionName = "Doe^Jane", "ID-4711", "St Elsewhere"
        values = ds.pixel_array + np.int16(n)
        ds.PixelData = values.tobytes()
        ds.save_as(tmp_path / f"{n}.dcm")
        lines.append(f"{n}.dcm,report {n}")
    lines.append("none.dcm,report none")
    (tmp_path / "none.dcm").write_bytes(file_of("rtplan.dcm"))
    (tmp_path / "t.csv").write_text("\n".join(lines))
    words = ("--csv", str(tmp_path / "t.csv"), "--image-column", "image", "--text-column", "text")
    assert main(["data", "convert", *words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "6 grey pictures came to 8 bits, 6 by their window and 0 by percentiles; clipped" in printed
    assert "t.csv line 8: image file cannot be read (none.dcm: is a DICOM file without pixels)" in printed
    assert open_dataset(tmp_path / "out").num_samples("all", "train") == 5
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in (b"Doe", b"4711", b"Elsewhere", str(ds.SOPInstanceUID).encode()):
        assert secret not in written


def test_a_burnt_in_marker_does_not_darken_a_radiograph() -> None:
    values = np.random.default_rng(0).normal(2000, 300, (100, 100)).astype(np.uint16)
    plain, _ = stretch(values)
    values[:5, :10] = 65535
    marked, clipped = stretch(values)
    # minimum and maximum would take the mean from 128 to 8; percentiles move by half a point of the distribution
    assert abs(float(plain.mean()) - float(marked.mean())) < 8
    assert 0.01 < clipped < 0.025
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    assert abs(float(np.asarray(to_rgb(open_image(out.getvalue()))).mean()) - float(plain.mean())) < 8
    assert stretch(np.full((4, 4), np.nan))[0].max() == 0


def in_a_page(data: bytes) -> np.ndarray:
    """As the pages of reports and searches show it."""
    from feddra_ds.evaluation.examples import thumbnail as of_page

    url = of_page(data, side=40)
    assert url is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


AS_IT_IS = {"flip": False, "brightness": 0.0}
DECODERS = {
    "evaluation, embed, search and probe": lambda data: evaluation_pixels(data, 40),
    "training": lambda data: training_pixels(data, 32, AugmentConfig(**AS_IT_IS), 1),
    "training, pad_crop": lambda data: training_pixels(data, 32, AugmentConfig(**AS_IT_IS, method="pad_crop", resize=40), 1),
    "processor": lambda data: np.asarray(to_rgb(Image.open(io.BytesIO(data)))),
    "convert": lambda data: np.asarray(Image.open(io.BytesIO(encode_image(data, None).data))),
    "inspect's likeness": thumbnail,
    "pages": in_a_page,
}  # fmt: skip


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
def test_exif_orientation_is_honoured_wherever_a_picture_is_decoded(decode) -> None:
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:20] = 255
    out, turned, upright = io.BytesIO(), Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(out, "JPEG", exif=turned, quality=95)
    Image.fromarray(np.rot90(pixels, -1)).save(upright, "JPEG", quality=95)
    pair = [decode(data.getvalue()).astype(int) for data in (out, upright)]
    assert pair[0].shape == pair[1].shape
    assert np.abs(pair[0] - pair[1]).mean() < 5
