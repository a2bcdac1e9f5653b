"""The data commands as a user types them: each ends by saying what comes next, each mistake has one clear line."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from feddra_ds.cli import main
from feddra_ds.data.format.dataset import open_dataset

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"


class Told(NamedTuple):
    stdout: str
    stderr: str


def feddra(*words: object, expect: int = 0) -> Told:
    """`feddra-ds data WORDS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(["data", *map(str, words)])
        except SystemExit as end:  # --help
            code = int(end.code or 0)
    assert code == expect, out.getvalue() + err.getvalue()
    return Told(out.getvalue(), err.getvalue())


def test_from_nothing_to_partitioned_data(tmp_path: Path) -> None:
    synth = feddra("synth", "--out", tmp_path / "synth", "--num-pairs", 60, "--image-size", 32).stdout
    assert "lung_sanatorium" in synth
    assert "\nNext:\n  feddra-ds data inspect" in synth
    seen = feddra("inspect", tmp_path / "synth", "--plot", tmp_path / "labels.svg").stdout
    assert "island_hospital (held out)" in seen
    assert "every shard is there and has its full size" in seen
    drawn = (tmp_path / "labels.svg").read_text()
    for cell in re.findall(r"cavity +│ +(\d+%)", seen):
        assert f">{cell}</text>" in drawn, "the picture has the table's shares"
    assert "<title>lung_sanatorium, effusion: " in drawn
    assert "ok       every shard is what its index says" in feddra("validate", tmp_path / "synth").stdout
    assert "\nNext:\n  feddra-ds train" in seen
    words = ("partition", tmp_path / "synth", "--out", tmp_path / "dealt", "--num-clients", 3, "--alpha", 1)
    dealt = feddra(*words, "--label", "effusion").stdout
    assert "client2" in dealt
    assert "\nNext:\n" in dealt
    dataset = open_dataset(tmp_path / "dealt")
    assert sum(dataset.num_samples(c, s) for c in dataset.client_ids for s in ("train", "val")) == 60


def test_a_damaged_dataset_is_told_by_inspect(tmp_path: Path) -> None:
    feddra("synth", "--out", tmp_path / "data", "--num-pairs", 40, "--image-size", 16)
    shard = tmp_path / "data" / "heart_centre" / "train-000000.tar"
    os.truncate(shard, 2048)
    seen = feddra("inspect", tmp_path / "data", expect=1).stdout
    assert f"PROBLEM  {shard}: was half written or changed: 2048 bytes" in seen
    (tmp_path / "data" / "heart_centre" / "index.json").unlink()
    assert "dataset.json names heart_centre, but there" in feddra("inspect", tmp_path / "data", expect=1).stdout
    os.truncate(shard, 0)
    written = feddra("inspect", tmp_path / "data", "--write-index", expect=2).stderr
    assert written.startswith(f"feddra-ds: {shard}: is not a whole, uncompressed tar")


def test_bad_pairs_are_noted_by_inspect(tmp_path: Path) -> None:
    from feddra_ds.data.format.writer import DatasetWriter

    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out, "PNG")
    good = {"image": out.getvalue(), "suffix": "png", "text": "a report", "info": {"labels": {"kind": "x|y"}}}
    with DatasetWriter(tmp_path / "data") as writer:
        for n, change in enumerate(({}, {"image": b"?"}, {"text": ""}, {"image": None}, {"text": None})):
            writer.add("a", "train", f"k{n}", **{**good, **change})
    line = (
        "PROBLEM  a: 4 of the 5 pairs looked at are unreadable (1 corrupt_image, 1 empty_text, 1 missing_image, 1 missing_text), "
        "more than"
    )
    assert line in feddra("inspect", tmp_path / "data", expect=1).stdout
    seen = feddra("inspect", tmp_path / "data", "--max-bad-fraction", 1).stdout
    assert (
        "note     unreadable among the pairs looked at: a (1 corrupt_image, 1 empty_text, 1 missing_image, "
        "1 missing_text among 5)" in seen
    )
    assert "kind=x " in seen, "a list's parts are labels of their own"
    assert "kind=y " in seen


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("inspect", "nowhere"), "data.root: nowhere is not a folder"),
        (("inspect", ".", "--samples", 0), "--samples: must be at least 1, got 0"),
        (("partition", "nowhere", "--out", "x"), "data.root: nowhere is not a folder"),
        (
            ("convert", "--csv", "no.csv", "--image-column", "a", "--text-column", "b", "--out", "x"),
            "--csv: cannot read no.csv",
        ),
    ],
)
def test_mistakes(words: tuple[object, ...], line: str) -> None:
    error = feddra(*words, expect=2).stderr.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"feddra-ds: {line}")


@pytest.mark.parametrize("command", ["synth", "convert", "partition", "inspect", "validate"])
def test_help_explains_every_option(command: str) -> None:
    text = feddra(command, "--help").stdout
    options = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    assert options
    for option in options:
        after = text.split(f"\n  {option}", 1)[1].split("\n  --")[0]
        assert len(after.split()) >= 4, option


def test_help_comes_without_waiting_for_torch() -> None:
    names = ("synth", "convert", "partition", "inspect", "validate")
    code = f"import sys, {', '.join(f'feddra_ds.commands.data_{name}' for name in names)}"
    code += "; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.skipif(not (SHARED / "cxr").is_dir(), reason="the radiographs are not beside this checkout")
def test_real_radiographs(tmp_path: Path) -> None:
    table = SHARED / "cxr" / "metadata.csv"
    words = (
        "--image-column",
        "image",
        "--text-column",
        "text",
        "--client-column",
        "region5",
        "--group-column",
        "patient",
    )
    feddra(
        "convert",
        "--csv",
        table,
        *words,
        "--val-fraction",
        0.25,
        "--label-columns",
        "labels",
        "--out",
        tmp_path / "cxr",
    )
    dataset = open_dataset(tmp_path / "cxr")
    assert dataset.num_samples("oceania", "val") == 11
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    sides: dict[str, set[str]] = {}
    texts: dict[int, set[str]] = {}
    count: Counter[str] = Counter()
    for client in dataset.client_ids:
        for split in ("train", "val"):
            part = dataset.samples(client, split)
            for i in range(len(part)):
                sides.setdefault(part.read_info(i)["patient"], set()).add(split)
                texts.setdefault(int(part.text_ids[i]), set()).add(split)
                count[split] += 1
    assert count == {"train": 208, "val": 69}
    assert count.total() == len(rows)
    assert max(map(len, sides.values())) == max(map(len, texts.values())) == 1


@pytest.mark.skipif(not (SHARED / "captions_coco").is_dir(), reason="the captions are not beside this checkout")
def test_photographs_with_captions(tmp_path: Path) -> None:
    words = ("--csv", SHARED / "captions_coco" / "metadata.csv", "--image-column", "image", "--text-column")
    wrong = feddra("convert", *words, "txt", "--client-column", "site", "--out", tmp_path / "coco", expect=2).stderr
    assert "has no column txt; did you mean text? Its columns are: image, text, labels" in wrong
    feddra("convert", *words, "text", "--client-column", "site", "--image-size", 96, "--out", tmp_path / "coco")
    dataset = open_dataset(tmp_path / "coco")
    assert dataset.client_ids == ["train2017", "val2017"]
    part = dataset.samples("val2017", "train")
    assert min(Image.open(io.BytesIO(part.read_image(0))).size) == 96
