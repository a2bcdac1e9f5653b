"""The door for data from elsewhere: one file and one row make a source, and ingest asks nothing more of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from data_helpers import encoded

from feddra_ds.cli import main
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.sources import SOURCES, source_class
from feddra_ds.data.sources.base import Columns, Skip, Source
from feddra_ds.data.sources.ingest import IngestOptions, ingest
from feddra_ds.data.sources.table import Table

FOLDERS = '''
"""A folder per client, whose files hold a text before a NUL and a picture after it."""

from feddra_ds.data.sources.base import Row, Skip, Source


class Folders(Source):
    option = "--from"

    def rows(self):
        for line, path in enumerate(sorted(self.path.glob("*/*.pair"))):
            text = path.read_bytes().split(b"\\0")[0].decode()
            client = path.parent.name
            yield Row(line, str(path), text, client, site=client) if text else Skip(line, "empty text", path.name)

    def read_image(self, row):
        _, nul, image = open(row.image, "rb").read().partition(b"\\0")
        if not nul:
            raise ValueError("has no picture")
        return image
'''


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Two clients with 8 pairs each, one of which has no text and one no picture."""
    (tmp_path / "folders_of_a_test.py").write_text(FOLDERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "folders", "folders_of_a_test:Folders")
    for n in range(16):
        path = tmp_path / "source" / f"hospital {n // 8}" / f"{n:02d}.pair"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"report %d\0" % n + encoded(n, form="WEBP"))
    (tmp_path / "source" / "hospital 0" / "03.pair").write_bytes(b"\0" + encoded(3))
    (tmp_path / "source" / "hospital 1" / "12.pair").write_bytes(b"no picture")
    return source_class("folders")(tmp_path / "source", Columns("", ""))


def test_a_source_of_ones_own_is_ingested(folders: Source, tmp_path: Path) -> None:
    seen: list[str] = []

    def track(items, total, what):
        seen.append(f"{what} {total}")
        return iter(items)

    done = ingest(folders, tmp_path / "out", IngestOptions(val_fraction=0.25), track)
    assert seen == ["reading rows None", "reading images 15", "writing shards 14"]
    assert done.counts == {"hospital_0": {"train": 5, "val": 2}, "hospital_1": {"train": 5, "val": 2}}
    bad = f"{tmp_path / 'source' / 'hospital 1' / '12.pair'}: has no picture"
    assert done.skipped == [Skip(3, "empty text", "03.pair"), Skip(12, "image file cannot be read", bad)]
    dataset = open_dataset(tmp_path / "out")
    assert dataset.info["client_names"] == {"hospital_0": "hospital 0", "hospital_1": "hospital 1"}
    for client, first in (("hospital_0", 0), ("hospital_1", 8)):
        told = {}
        for split in ("train", "val"):
            part = dataset.samples(client, split)
            told |= {part.read_info(i)["line"]: part.read_text(i).decode() for i in range(len(part))}
        assert told == {n: f"report {n}" for n in range(first, first + 8) if n not in (3, 12)}


def convert(*words: str) -> int:
    return main(["data", "convert", *words])


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of docs/data.md in a package of the user's, and 8 pairs for it, one without a text."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "own_source_of_a_test").mkdir()
    (tmp_path / "own_source_of_a_test" / "__init__.py").write_text("")
    (tmp_path / "own_source_of_a_test" / "folders.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for n in range(8):
        path = tmp_path / "scans" / ("north", "south")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(n, form="PNG"))
        if n != 5:
            path.with_suffix(".report").write_text(f"report {n}")
    return tmp_path / "scans"


OWN = "own_source_of_a_test.folders:Folders"


def test_a_source_of_the_user_s_own_is_converted_without_a_fork(own_folders: Path, tmp_path: Path, capsys) -> None:
    words = ("--from", OWN, "--path", str(own_folders), "--source-option", "ending=report", "--val-fraction", "0.25")
    assert convert(*words, "--out", str(tmp_path / "out")) == 0
    assert "line 6: no text (5.png)" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out")
    counts = {
        client: [dataset.num_samples(client, split) for split in ("train", "val")] for client in dataset.client_ids
    }
    assert counts == {"north": [3, 1], "south": [2, 1]}


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ([], ["--csv: is needed, or --from and --path for another source"]),
        (["--csv", "x.csv"], ["--image-column: is needed with --csv", "--text-column: is needed with --csv"]),
        (["--from", OWN], ["--path: is needed with --from"]),
        (
            ["--csv", "x.csv", "--image-column", "i", "--text-column", "t", "--path", "x"],
            ["--path: does not go with --csv"],
        ),
        (
            ["--from", "own_source_of_a_test.folders:Folder", "--path", "x"],
            ["--from: own_source_of_a_test.folders:Folder: "],
        ),
        (["--from", "os.path:PurePath", "--path", "x"], ["--from: os.path:PurePath: os.path has no class"]),
        (
            ["--from", OWN, "--path", "x", "--source-option", "end=txt", "--source-option", "ending"],
            ["--source-option: ending is not KEY=VALUE", "--source-option end: unknown; there are: ending"],
        ),
    ],
)
def test_what_is_wrong_with_a_source_is_said_by_option(
    own_folders: Path, tmp_path: Path, capsys, words: list[str], lines: list[str]
) -> None:
    assert convert(*words, "--out", str(tmp_path / "out")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(lines), errors
    for error, line in zip(errors, lines, strict=True):
        assert error.removeprefix("feddra-ds: ").startswith(line)
    assert not (tmp_path / "out").exists()


def test_messages_begin_with_the_source_s_own_option(folders: Source, tmp_path: Path) -> None:
    for path in folders.path.glob("*/*.pair"):
        path.write_bytes(b"\0")
    with pytest.raises(DataError, match=r"--from: no row of .*/source is usable\nline 0: empty text \(00.pair\)\n"):
        ingest(folders, tmp_path / "out", IngestOptions())
    assert not (tmp_path / "out").exists()


def test_the_table_is_a_row_of_the_sources() -> None:
    assert source_class("csv") is Table
