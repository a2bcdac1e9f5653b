"""Data as hospitals have them, made by each format's own package: converted pair for pair, malformed rows named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import client_data, encoded

from feddra_ds.cli import main
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.format.text import no_report
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.sources.reports import choose_sections, sections

COLUMNS = ("image", "text", "hospital", "patient")
ROWS = [(f"images/{n}.jpg", f"réport number {n}", f"H{n % 2}", f"p{n // 3}") for n in range(24)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in" / "images").mkdir(parents=True)
    for n in range(24):
        (tmp_path / "in" / "images" / f"{n}.jpg").write_bytes(encoded(n))
    return tmp_path / "in"


def convert(*words: object, columns: bool = True) -> int:
    named = "--image-column image --text-column text --client-column hospital --group-column patient".split()
    return main(["data", "convert", *map(str, words), *(named if columns else [])])


def pairs(root: Path) -> dict[str, tuple[str, str, bytes]]:
    """{text: (client, split, image)} of a dataset."""
    dataset, out = open_dataset(root), {}
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            part = dataset.samples(client, split)
            for i in range(len(part)):
                out[part.read_text(i).decode()] = (client, split, part.read_image(i))
    return out


def as_text(encoding: str, delimiter: str, name: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([COLUMNS, *ROWS])
        data = text.getvalue().encode(encoding)
        (place / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return place / name

    return write


def as_json_lines(place: Path) -> Path:
    lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in ROWS]
    (place / "t.jsonl").write_text("\n".join([*lines[:10], "", *lines[10:]]), encoding="utf-8-sig")
    return place / "t.jsonl"


def as_parquet(place: Path) -> Path:
    table = pyarrow.table({name: [row[i] for row in ROWS] for i, name in enumerate(COLUMNS)})
    (place / "parts").mkdir()
    for part in range(2):
        pyarrow.parquet.write_table(table.slice(12 * part, 12), place / "parts" / f"{part}.parquet")
    return place / "parts"


def as_excel(place: Path) -> Path:
    book = openpyxl.Workbook()
    book.create_sheet("second")
    for row in [COLUMNS, *ROWS]:
        book.active.append(row)
    book.save(place / "t.xlsx")
    return place / "t.xlsx"


def as_dataset_on_disk(place: Path) -> Path:
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(COLUMNS)}
    columns["image"] = [str(place / path) for path in columns["image"]]
    columns["hospital"] = [int(name[1]) for name in columns["hospital"]]
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data = data.cast_column("hospital", datasets.ClassLabel(names=["H0", "H1"]))
    data.map(lambda row: row).save_to_disk(str(place / "saved"))
    return place / "saved"


@pytest.mark.parametrize(
    ("kind", "write", "words"),
    [
        ("csv", as_text("utf-8-sig", ";", "t.csv"), ""),
        ("csv", as_text("utf-16", ",", "t.csv"), ""),
        ("csv", as_text("utf-8", ",", "t.csv.gz"), ""),
        ("tsv", as_text("cp1252", "\t", "t.tsv"), "--source-option encoding=cp1252"),
        ("jsonl", as_json_lines, ""),
        ("parquet", as_parquet, "images"),
        ("excel", as_excel, "--source-option sheet=Sheet"),
        ("huggingface", as_dataset_on_disk, ""),
    ],
    ids=["byte order mark", "utf-16", "gz", "cp1252", "jsonl", "parquet", "excel", "huggingface"],
)
def test_every_format_gives_the_same_dataset(place: Path, tmp_path: Path, kind: str, write, words: str) -> None:
    path = write(place)
    more = ["--source-option", f"images={place}"] if words == "images" else words.split()
    assert convert("--from", kind, "--path", path, *more, "--out", tmp_path / "out") == 0
    found = pairs(tmp_path / "out")
    assert {text: (client, image) for text, (client, _, image) in found.items()} == {
        row[1]: (row[2], encoded(n)) for n, row in enumerate(ROWS)
    }


def test_pictures_inside_parquet_need_no_files(place: Path, tmp_path: Path) -> None:
    images = [{"bytes": encoded(n), "path": None} for n in range(24)]
    columns = {"image": images} | {name: [row[i] for row in ROWS] for i, name in enumerate(COLUMNS) if i}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert convert("--from", "parquet", "--path", tmp_path / "t.parquet", "--out", tmp_path / "out") == 0
    assert {text: image for text, (_, _, image) in pairs(tmp_path / "out").items()} == {
        row[1]: encoded(n) for n, row in enumerate(ROWS)
    }


def test_malformed_lines_are_named_and_a_rehearsal_writes_nothing(place: Path, tmp_path: Path, capsys) -> None:
    path = as_json_lines(place)
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    lines[2], lines[3], lines[4] = "{", "[1]", lines[4].replace("images/4.jpg", "images/none.jpg")
    path.write_text("\n".join(lines))
    for words in (["--dry-run"], []):
        assert convert("--from", "jsonl", "--path", path, "--out", tmp_path / "out", *words) == 0
        printed = capsys.readouterr().out
        assert "t.jsonl line 3: not JSON in UTF-8" in printed
        assert "t.jsonl line 4: not a JSON object" in printed
        assert "t.jsonl line 5: image file cannot be read (images/none.jpg: No such file or directory)" in printed
        assert (tmp_path / "out").exists() == (not words)
    assert (
        convert("--from", "jsonl", "--path", path, "--text-column", "txt", "--out", tmp_path / "x", columns=False) == 2
    )
    assert "--image-column: is needed with --from jsonl" in capsys.readouterr().err


def test_a_table_of_another_format_says_which_source_reads_it(place: Path, tmp_path: Path, capsys) -> None:
    as_excel(place).rename(place / "t.csv")
    assert convert("--csv", place / "t.csv", "--out", tmp_path / "out") == 2
    assert "is an Excel workbook; read it with --from excel --path" in capsys.readouterr().err


def test_a_split_of_the_source_s_own_is_kept(place: Path, tmp_path: Path) -> None:
    (place / "t.csv").write_text(
        "image,text,part\n"
        + "".join(f"images/{n}.jpg,r{n},{('train', 'validate', 'test')[n % 3]}\n" for n in range(24))
    )
    words = ("--csv", place / "t.csv", "--image-column", "image", "--text-column", "text", "--split-column", "part")
    assert convert(*words, "--out", tmp_path / "out", columns=False) == 0
    assert {text: split for text, (_, split, _) in pairs(tmp_path / "out").items()} == {
        f"r{n}": ("train", "val", "test")[n % 3] for n in range(24)
    }


def test_a_column_of_no_reports_is_refused(place: Path, tmp_path: Path, capsys) -> None:
    rows = [
        [image, text if n > 3 else ("nan", "None", "___", ".")[n], *rest] for n, (image, text, *rest) in enumerate(ROWS)
    ]
    with (place / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    words = ("--csv", place / "t.csv", "--out", tmp_path / "out")
    assert convert(*words) == 2
    assert "4 of 24 texts" in (error := capsys.readouterr().err)
    assert "e.g. t.csv line 2: no report (nan)" in error
    assert convert(*words, "--max-no-report", 0.2) == 0
    assert len(pairs(tmp_path / "out")) == 20


def test_git_lfs_pointers_are_told_wherever_they_stand(place: Path, tmp_path: Path, capsys) -> None:
    """In the table's place, a picture's, a text's, a shard's, and for members of a shard."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    rows = [[image, pointer.decode() if n == 4 else text, *rest] for n, (image, text, *rest) in enumerate(ROWS)]
    (place / "images" / "7.jpg").write_bytes(pointer)
    with (place / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    assert convert("--csv", place / "t.csv", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "git lfs pointer (version https" in printed
    assert (
        "image file cannot be read (images/7.jpg: a Git-LFS pointer, not the picture; git lfs pull fetches it)"
        in printed
    )
    (place / "t.csv").write_bytes(pointer)
    assert convert("--csv", place / "t.csv", "--out", tmp_path / "other") == 2
    assert "t.csv is a Git-LFS pointer, not the file; git lfs pull fetches it" in capsys.readouterr().err
    (place / "0.tar").write_bytes(pointer)
    assert main(["data", "inspect", "--clients", f"{{a: {place}}}"]) == 2
    assert "0.tar is a Git-LFS pointer, not the shard (1 of 1); git lfs pull fetches them" in capsys.readouterr().err
    with DatasetWriter(tmp_path / "members") as writer:
        for n in range(10):
            writer.add("a", "train", f"k{n}", image=pointer if n < 2 else encoded(n), text=f"r{n}", info={})
    assert main(["data", "inspect", str(tmp_path / "members")]) == 1
    assert "a: 2 of the 10 pairs looked at are unreadable (2 git_lfs_pointer)" in capsys.readouterr().out
    with DecodePool() as pool:
        data = client_data(open_dataset(tmp_path / "members"), ["a"], pool=pool, max_bad_fraction=0.2)
        list(data.batches(Position(), 3))
    assert set(data.take_skipped()) == {"git_lfs_pointer"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nan", "no_report"), ("None", "no_report"), ("___", "no_report"), (" . ", "no_report"), ("N/A", "no_report"),
        ("", "empty_text"), ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3", "git_lfs_pointer"),
        ("No change.", None), ("___ year old, normal", None), ("正常", None),
    ],
)  # fmt: skip
def test_what_is_a_report(text: str, reason: str | None) -> None:
    assert no_report(text) == reason


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman // ?pneumonia

 FINDINGS:

 LUNGS: clear.
 The impression: none is given here.

 IMPRESSION:

 No acute process {n}.
"""


def test_sections_of_a_report() -> None:
    assert sections(REPORT)["findings"] == "LUNGS: clear. The impression: none is given here."
    assert choose_sections(REPORT, ("impression",)) == "No acute process {n}."
    assert choose_sections("FINDINGS: Clear. CONCLUSION: Normal.", ("impression", "findings")) == "Normal. Clear."
    assert choose_sections("Just prose.", ("findings",)) == ""


def mimic(place: Path, zipped: bool) -> None:
    """MIMIC-CXR-JPG's layout with 12 studies of 4 patients, two views each; one study has no report."""
    metadata, labels, split = [], [], []
    reports = {}
    for n in range(12):
        subject, study = str(10000000 + n // 3), str(50000000 + n)
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        (place / folder).mkdir(parents=True)
        for view in ("PA", "LATERAL"):
            (place / folder / f"d{n}-{view}.jpg").write_bytes(encoded(2 * n + (view == "PA")))
            metadata.append([f"d{n}-{view}", subject, study, view, "2500"])
            split.append([f"d{n}-{view}", study, subject, ("train", "train", "validate", "test")[n // 3]])
        labels.append([subject, study, "1.0" if n % 2 else "-1.0", ""])
        if n != 5:
            reports[f"{folder}.txt"] = REPORT.format(n=n)
    heads = {
        "metadata": ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows"],
        "chexpert": ["subject_id", "study_id", "Edema", "No Finding"],
        "split": ["dicom_id", "study_id", "subject_id", "split"],
    }
    for (name, head), rows in zip(heads.items(), (metadata, labels, split), strict=True):
        with gzip.open(place / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows([head, *rows])
    if zipped:
        with zipfile.ZipFile(place / "mimic-cxr-reports.zip", "w") as archive:
            for name, text in reports.items():
                archive.writestr(name, text)
    else:
        for name, text in reports.items():
            (place / name).write_text(text)


@pytest.mark.parametrize("zipped", [False, True], ids=["files", "zip"])
def test_mimic_cxr_jpg_as_it_is_downloaded(tmp_path: Path, capsys, zipped: bool) -> None:
    mimic(tmp_path, zipped)
    assert convert("--from", "mimic_cxr", "--path", tmp_path, "--out", tmp_path / "out", columns=False) == 0
    printed = capsys.readouterr().out
    assert "metadata.csv.gz line 12: no report (files/p10/p10000001/s50000005.txt)" in printed
    assert "12 as asked: view LATERAL" in printed
    found = pairs(tmp_path / "out")
    assert {text.rpartition("process ")[2]: (split, image) for text, (_, split, image) in found.items()} == {
        f"{n}.": (("train", "train", "val", "test")[n // 3], encoded(2 * n + 1)) for n in range(12) if n != 5
    }
    assert all(text.startswith("LUNGS: clear.") for text in found)
    part = open_dataset(tmp_path / "out").samples("all", "val")
    infos = sorted((part.read_info(i) for i in range(len(part))), key=lambda info: info["line"])
    assert [info["labels"] for info in infos] == [
        {"Edema": "1" if n % 2 else "-1", "No Finding": None} for n in range(6, 9)
    ]
    assert {info["patient"] for info in infos} == {"10000002"}


def test_open_i_reports_with_their_pictures(tmp_path: Path, capsys) -> None:
    for n in range(8):
        (tmp_path / f"{n}.xml").write_text(
            f"<eCitation><Abstract><AbstractText Label='INDICATION'>x</AbstractText><AbstractText Label='FINDINGS'>Clear {n}."
            "</AbstractText></Abstract><MeSH><major>Opacity/lung</major></MeSH>"
            f"<parentImage id='CXR{n}_1_IM-1'/><parentImage id='CXR{n}_1_IM-2'/></eCitation>"
        )
        for view in (1, 2):
            (tmp_path / f"CXR{n}_1_IM-{view}.png").write_bytes(encoded(2 * n + view, form="PNG"))
    (tmp_path / "7.xml").write_text("<eCitation>")
    with (tmp_path / "views.csv").open("w", newline="") as file:
        views = [[f"1_IM-{view}.dcm.png", ("Frontal", "Lateral")[view - 1]] for view in (1, 2)]
        csv.writer(file).writerows([["filename", "projection"], *views])
    words = ("--from", "openi", "--path", tmp_path, "--source-option", f"projections={tmp_path / 'views.csv'}")
    assert convert(*words, "--out", tmp_path / "out", columns=False) == 0
    printed = capsys.readouterr().out
    assert "7.xml picture" in printed
    assert "not XML" in printed
    assert {text: image for text, (_, _, image) in pairs(tmp_path / "out").items()} == {
        f"Clear {n}.": encoded(2 * n + 1, form="PNG") for n in range(7)
    }


def test_an_id_without_a_network_is_one_line(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert convert("--from", "huggingface", "--path", "acme/cxr", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("feddra-ds: --path: cannot open acme/cxr with datasets: Couldn't reach ")
    assert line.endswith("is this machine online? A folder that save_to_disk wrote needs no network")
    assert not list(tmp_path.iterdir()), "nothing is left"
