"""Pixels: equal to transformers' processor in evaluation, seeded and in bounds in training, bombs refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from data_helpers import MEAN, STD, encoded, huge_png
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from feddra_ds.config.schema import AugmentConfig
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.images import BadSample, evaluation_pixels, open_image, to_rgb, training_pixels

PLAIN = AugmentConfig(crop_scale=1.0, flip=False, brightness=0.0)


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA")]
)
@pytest.mark.parametrize("size", [(50, 37), (20, 64)])
def test_evaluation_pixels_equal_the_processor(form: str, mode: str, size: tuple[int, int]) -> None:
    data = encoded(3, size, form, mode)
    processor = ViTImageProcessorPil(size={"height": 24, "width": 24}, image_mean=MEAN, image_std=STD)
    expected = processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(evaluation_pixels(data, 24))[None]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (MEAN, STD))
    none = torch.empty(1, 0)
    batch = Batch(pixels, none, none, none, ["k"], mean, std)
    torch.testing.assert_close(batch.pixel_values, expected, atol=2e-6, rtol=0)


def test_training_without_augmentation_equals_evaluation() -> None:
    data = encoded(1, (60, 45), "PNG")
    assert np.array_equal(training_pixels(data, 16, PLAIN, 0), evaluation_pixels(data, 16))


def test_augmentation_is_a_function_of_its_seed() -> None:
    data, augment = encoded(1, (60, 45)), AugmentConfig(crop_scale=0.5, flip=True, brightness=0.2)
    first = training_pixels(data, 16, augment, 0, "client", 2, 5)
    assert np.array_equal(first, training_pixels(data, 16, augment, 0, "client", 2, 5))
    others = [training_pixels(data, 16, augment, 0, "client", epoch, 5) for epoch in range(3, 8)]
    assert all(not np.array_equal(first, other) for other in others)


def test_each_augmentation_acts() -> None:
    data = encoded(2, (64, 64), "PNG")
    whole = evaluation_pixels(data, 16).astype(int)
    mirrored = AugmentConfig(crop_scale=1.0, flip=True, brightness=0.0)
    flips = [np.array_equal(training_pixels(data, 16, mirrored, s), whole[:, :, ::-1]) for s in range(40)]
    assert 10 < sum(flips) < 30
    lit = AugmentConfig(crop_scale=1.0, flip=False, brightness=0.3)
    brighter = [training_pixels(data, 16, lit, s).mean() - whole.mean() for s in range(40)]
    assert min(brighter) < -10 < 10 < max(brighter)
    assert max(abs(b) for b in brighter) < 0.3 * 255


@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0])
def test_crops_have_the_area_asked_for_and_lie_inside(scale: float) -> None:
    """On a picture whose channels are its coordinates, the crop's corners can be read off its pixels."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    out = io.BytesIO()
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(out, "PNG")
    cropped = AugmentConfig(crop_scale=scale, flip=False, brightness=0.0)
    areas = []
    for seed in range(30):
        pixels = training_pixels(out.getvalue(), 50, cropped, seed).astype(float)
        width, height = ((pixels[c].max() - pixels[c].min()) / 200 * 50 / 49 for c in (0, 1))
        areas.append(width * height)
        assert 0.72 < width / height < 1.39
    assert min(areas) > scale * 0.93
    assert max(areas) < 1.04
    assert scale == 1.0 or min(areas) < scale + 0.35 * (1 - scale)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_pad_crop_stretches_nothing(form: str) -> None:
    """A picture twice as wide as high, whose red and green are its coordinates: black above and below it, and the scale kept."""
    x, y = np.meshgrid(np.arange(240), np.arange(120))
    out = io.BytesIO()
    Image.fromarray(np.stack([x, y, np.full_like(x, 255)], -1).astype(np.uint8)).save(out, form, quality=95)
    padded = AugmentConfig(method="pad_crop", resize=60, brightness=0.0)
    whole = training_pixels(out.getvalue(), 60, padded, 0).astype(float)  # nothing is left to crop
    blue = whole[2] > 128
    assert blue[15:45].all()
    assert not blue[:14].any()
    assert not blue[46:].any()
    for channel, axis, step in ((0, 1, 4), (1, 0, 4)):  # 240 pixels to 60, on both axes
        assert np.abs(np.diff(whole[channel, 18:42], axis=axis).mean() - step) < 0.2
    found = [training_pixels(out.getvalue(), 40, padded, seed) for seed in range(40)]
    places = [(y, x) for y in range(21) for x in range(21)]
    corners = {
        next((y, x) for y, x in places if np.array_equal(whole[:, y : y + 40, x : x + 40], part)) for part in found
    }
    assert len(corners) > 30
    assert {0, 20} & {y for y, _ in corners}


def test_large_jpegs_are_decoded_scaled_and_look_the_same() -> None:
    data = encoded(5, (640, 480))
    image = open_image(data)
    image.draft(None, (32, 32))
    assert image.size == (80, 60), "draft mode is what makes this cheap"
    scaled = training_pixels(data, 32, PLAIN, 0).astype(int)
    assert np.abs(scaled - evaluation_pixels(data, 32).astype(int)).mean() < 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt_image"),
        (b"GIF89a" + bytes(40), "corrupt_image"),
        (encoded(0)[:200], "corrupt_image"),
        (encoded(0, form="PNG")[:120], "corrupt_image"),
        (encoded(0, form="BMP"), "corrupt_image"),  # only JPEG and PNG are decoded
        (huge_png(), "oversized_image"),
        (huge_png(10_000), "oversized_image"),
    ],
    ids=["empty", "gif", "cut jpeg", "cut png", "bmp", "bomb", "large"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_have_a_reason(data: bytes, reason: str) -> None:
    for decode in (lambda: evaluation_pixels(data, 16), lambda: training_pixels(data, 16, PLAIN, 0)):
        with pytest.raises(BadSample) as caught:
            decode()
        assert caught.value.reason == reason


def test_sixteen_bit_images_keep_their_greys() -> None:
    values = np.linspace(1000, 4000, 32 * 32).reshape(32, 32).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    grey = np.asarray(to_rgb(open_image(out.getvalue())))[..., 0]
    assert (grey.min(), grey.max()) == (0, 255)
    assert np.all(np.diff(grey.ravel().astype(int)) >= 0)
    flat = Image.fromarray(np.full((4, 4), 500, dtype=np.uint16))
    assert np.asarray(to_rgb(flat)).max() == 0
