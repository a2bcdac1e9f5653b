"""The same picture saved anew is found at another client; different pictures are not taken for one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from feddra_ds.cli import main
from feddra_ds.data.format.likeness import alike, thumbnail
from feddra_ds.data.format.writer import DatasetWriter


def picture(number: int) -> Image.Image:
    """Blobs of their own on a body that all pictures share, as radiographs do."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:160, 0:160] / 160
    grey = 0.6 * np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.1)
    for cx, cy, size, height in rng.uniform((0, 0, 0.002, -0.4), (1, 1, 0.01, 0.4), (12, 4)):
        grey += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size)
    return Image.fromarray((grey.clip(0, 1) * 255).astype(np.uint8))


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_saved_anew_is_alike_and_others_are_not() -> None:
    originals = [saved(picture(n)) for n in range(40)]
    anew = [
        saved(ImageEnhance.Brightness(picture(n).resize((100, 100))).enhance(0.8), "JPEG", quality=50)
        for n in range(40)
    ]
    assert alike(np.array([thumbnail(data) for data in originals])) == []
    both = np.array([thumbnail(data) for data in originals + anew])
    assert alike(both) == [(n, n + 40) for n in range(40)]
    flat = np.array([thumbnail(saved(Image.new("L", (64, 64), grey))) for grey in (3, 90)])
    assert alike(flat) == [], "nothing can be said of flat pictures"


def test_inspect_finds_a_picture_saved_anew_and_what_texts_lose(tmp_path: Path, capsys) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        for n in range(8):
            for client in ("north", "south"):
                number = n + 100 * (client == "south")
                data = saved(picture(3), "JPEG", quality=60) if (client, n) == ("south", 5) else saved(picture(number))
                suffix = "jpg" if data.startswith(b"\xff\xd8") else "png"
                text = "normal" if client == "north" else " ".join(f"word {number}" for _ in range(n))
                writer.add(
                    client, "train" if n < 6 else "val", f"k{n}", image=data, suffix=suffix, text=f"{text} .x", info={}
                )
    assert main(["data", "inspect", str(tmp_path / "data"), "--text-length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "1 pictures that look alike are at two clients: north/train/k3 and south/train/k5" in printed
    assert "data.text_length 8 cuts texts: south" in printed
    assert (
        "8 of the 16 texts looked at are not the only ones of their wording, the most frequent comes 8 times" in printed
    )
