"""The same picture saved anew is found at another client; different pictures are not taken for one."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from feddra_ds.cli import main
from feddra_ds.data.format.likeness import alike, thumbnail
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.tokens import load_tokenizer


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


def planted(root: Path) -> None:
    """Two hospitals' shards as others made them, in one set too: a patient in train and val, a patient at both hospitals, a
    picture saved anew at the other one, texts that come again."""
    for name, hospital in (("north", "north"), ("south", "south")):
        for split in ("train", "val"):
            numbers = range(6) if split == "train" else range(6, 9)
            members: list[tuple[str, bytes]] = []
            for n in numbers:
                number = n + 100 * (name == "south")
                data = saved(picture(3), "JPEG", quality=60) if (name, n) == ("south", 7) else saved(picture(number))
                patient = {("north", 2): "twice", ("north", 6): "twice", ("north", 4): "both", ("south", 4): "both"}
                text = "normal" if n in (1, 8) else " ".join([f"word {number}"] * (n + 1))
                info = {"hospital": hospital, "patient": patient.get((name, n), f"{name}{n}")}
                suffix = "jpg" if data.startswith(b"\xff\xd8") else "png"
                members += [(f"{name}{n}.{suffix}", data), (f"{name}{n}.txt", text.encode())]
                members.append((f"{name}{n}.json", json.dumps(info).encode()))
            for folder in (root / name / split, root / "set" / split):
                folder.mkdir(parents=True, exist_ok=True)
                with tarfile.open(folder / f"{name}.tar", "w") as out:
                    for member, data in members:
                        entry = tarfile.TarInfo(member)
                        entry.size = len(data)
                        out.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("named", ["options", "config", "one set"])
def test_inspect_finds_what_was_planted_in_shards_from_elsewhere(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where indexes are kept, unless a config says
    planted(tmp_path)
    clients = {c: [f"{tmp_path}/{c}/{split}/{c}.tar" for split in ("train", "val")] for c in ("north", "south")}
    data: dict[str, object] = {"clients": clients}
    words = ["--clients", json.dumps(clients)]
    if named == "one set":
        data = {
            "root": f"{tmp_path}/set/{{train,val}}/{{north,south}}.tar",
            "client_field": "hospital",
            "order": "streaming",
        }
    if named != "options":
        config = {"data": {**data, "text_length": 8, "streaming": {"cache_dir": str(tmp_path / "cache")}}}
        (tmp_path / "c.yaml").write_text(json.dumps(config))
        words = ["--config", str(tmp_path / "c.yaml")]
    words += ["--text-length", "8"] if named == "options" else []
    assert main(["data", "inspect", *words]) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM  north: 1 patients are in train and in another split too" in printed
    assert "e.g. twice; convert with --group-column, or let data.val_fraction split" in printed
    assert "1 patients are at more than one client, by their ids: both" in printed
    assert "1 pictures that look alike are at two clients: north/train/north3 and south/val/south7" in printed
    assert "1 pictures that look alike are in two splits" in printed
    assert "1 texts are in train and in another split too" in printed
    assert (
        "4 of the 18 texts looked at are not the only ones of their wording, the most frequent comes 4 times" in printed
    )
    assert "data.text_length 8 cuts texts: " in printed
    tokenizer = load_tokenizer(None)
    texts = ["normal" if n in (1, 8) else " ".join([f"word {n}"] * (n + 1)) for n in range(9)]
    low, middle, high = (
        np.percentile([len(tokenizer(text).input_ids) for text in texts], [5, 50, 95]).round().astype(int)
    )
    assert re.search(rf"north .*│ +6 │ +3 │.*│ +{middle} \({low}–{high}\) │", printed), "tokens of each text"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "data.root: is needed"),
        (["x", "--clients", "{a: x}"], "data.root: contradicts data.clients"),
        (["--clients", "north"], "data.clients: must be a valid dictionary"),
        (["--clients", "{a: x}", "--write-index"], "--write-index: is for a folder of one folder per client"),
    ],
)
def test_what_inspect_cannot_look_at(words: list[str], line: str, capsys) -> None:
    assert main(["data", "inspect", *words]) == 2
    assert capsys.readouterr().err.startswith(f"feddra-ds: {line}")


def test_a_picture_that_ends_too_early_is_unreadable_to_inspect_as_it_is_to_training(tmp_path: Path, capsys) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        for n in range(4):
            data = saved(picture(n))
            writer.add(
                "a", "train", f"k{n}", image=data[: len(data) // 2] if n < 2 else data, suffix="png", text=f"r{n}"
            )
    assert main(["data", "inspect", str(tmp_path / "data")]) == 1
    assert "a: 2 of the 4 pairs looked at are unreadable (2 corrupt_image)" in capsys.readouterr().out


def test_labels_are_told_apart_as_evaluate_does(tmp_path: Path, capsys) -> None:
    labels = [
        {"edema": "1", "view": "PA", "device": 1},
        {"edema": "0", "view": "1", "device": 0},
        {"edema": "-1", "view": "", "device": True},
    ]
    with DatasetWriter(tmp_path / "data") as writer:
        for n, own in enumerate(labels):
            writer.add("a", "train", f"k{n}", image=saved(picture(n)), suffix="png", text=f"r{n}", info={"labels": own})
    assert main(["data", "inspect", str(tmp_path / "data"), "--max-pictures", "0"]) == 0
    printed = capsys.readouterr().out
    told = dict(re.findall(r"^(\S+) +│ +(\d+%)", printed, re.MULTILINE))
    assert told == {"edema": "33%", "device": "67%", "view=PA": "33%", "view=1": "33%"}
