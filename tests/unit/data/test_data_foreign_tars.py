"""Tars made elsewhere: names are read as webdataset reads them, or counted and named; nothing is lost silently."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from data_helpers import encoded

from feddra_ds.cli import main
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.format.writer import DatasetWriter, index_folder


def tar(root: Path, *members: tuple[str, bytes]) -> Path:
    folder = root / "north"
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "train-000000.tar", "w") as out:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return folder


def pairs(root: Path) -> list[tuple[str, bytes | None, bytes | None]]:
    part = open_dataset(root).samples("north", "train")
    return [(part.keys[i], part.read_image(i), part.read_text(i)) for i in range(len(part))]


@pytest.mark.parametrize("name", ["./{}", "batch.v1/{}", "a.b/c.d/{}", "{}"])
def test_folders_and_capitals_are_as_webdataset_has_them(tmp_path: Path, name: str) -> None:
    members = [
        (f"{name.format(n)}.{end}", data) for n in range(3) for end, data in (("JPG", encoded(n)), ("txt", b"t%d" % n))
    ]
    folder = tar(tmp_path, *members)
    notes: list[str] = []
    assert index_folder(folder, notes=notes) == {"train": 3}
    assert not notes
    theirs = webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False)
    assert pairs(tmp_path) == [(one["__key__"], one["jpg"], one["txt"]) for one in theirs]


def test_names_that_come_twice_and_members_apart(tmp_path: Path) -> None:
    again = [("a.jpg", encoded(1)), ("a.txt", b"1"), ("a.jpg", encoded(2)), ("a.txt", b"2")]
    apart = [("b.jpg", encoded(3)), ("c.jpg", encoded(4)), ("b.txt", b"3"), ("c.txt", b"4")]
    notes: list[str] = []
    assert index_folder(tar(tmp_path, *again, *apart, ("d.gif", b"x")), notes=notes) == {"train": 4}
    assert pairs(tmp_path) == [(k, encoded(n), b"%d" % n) for n, k in enumerate(("a", "a#2", "b", "c"), 1)]
    said = "\n".join(notes)
    assert "1 names come twice, each a sample of its own, e.g. train-000000.tar/a.jpg" in said
    assert "2 members are not beside the others of their sample, e.g. train-000000.tar/b.txt" in said
    assert "1 members of other kinds were left out, e.g. train-000000.tar/d.gif" in said


def test_a_shard_of_uids_has_no_sample_and_says_why(tmp_path: Path) -> None:
    folder = tar(tmp_path, ("1.2.840.1.jpg", encoded(0)), ("1.2.840.1.txt", b"x"))
    with pytest.raises(
        DataError, match=r"no sample among its 2 members \(2 members with dots .* e.g. .*1.2.840.1.jpg\)"
    ):
        index_folder(folder)
    assert not (folder / "index.json").exists()


def test_captions_in_json(tmp_path: Path) -> None:
    members = [(f"{n}.{end}", data) for n in range(3)
               for end, data in (("jpg", encoded(n)), ("json", json.dumps({"caption": f"é {n}"}).encode()))]  # fmt: skip
    tar(tmp_path, *members)
    assert main(["data", "inspect", str(tmp_path), "--write-index", "--text-field", "caption"]) == 0
    assert [text.decode() for _, _, text in pairs(tmp_path)] == ["é 0", "é 1", "é 2"]
    assert open_dataset(tmp_path).samples("north", "train").text_ids.tolist() == [text_id(f"é {n}") for n in range(3)]


def test_too_many_unreadable_pairs_and_shared_patients_are_problems(tmp_path: Path, capsys) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        for n in range(20):
            for client in ("north", "south"):
                patient = "p7" if client == "north" and n in (3, 15) else f"{client}-{n}"
                text = "nan" if client == "south" and n < 3 else f"report {n}"
                info = {"patient": "both" if n == 9 else patient}
                writer.add(client, "train" if n < 12 else "val", f"k{n}", image=encoded(n), text=text, info=info)
    assert main(["data", "inspect", str(tmp_path / "data")]) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM  north: 1 patients are in train and in another split too" in printed
    assert "e.g. p7; convert with --group-column" in printed
    assert "PROBLEM  south: 3 of the 20 pairs looked at are unreadable (3 no_report)" in printed
    assert "note     1 patients are at more than one client, by their ids: both" in printed
