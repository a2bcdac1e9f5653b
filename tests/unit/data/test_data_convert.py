"""From a CSV to a dataset: nothing leaks over the split, nothing is lost silently, every mistake has one clear line."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encoded, huge_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feddra_ds.cli import main
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.loading.images import BadSample
from feddra_ds.data.sources.encode import encode_image
from feddra_ds.data.sources.split import choose_validation, components


def run(*words: str) -> int:
    return main(["data", "convert", *words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 pairs of 3 clients, 20 patients with 3 pictures each."""
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    with (source / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "report", "hospital", "patient", "disease"])
        for n in range(60):
            (source / "images" / f"{n}.jpg").write_bytes(encoded(n))
            table.writerow(
                [
                    f"images/{n}.jpg",
                    f"report, with a comma, number {n}",
                    f"H{n % 3}",
                    f"p{n // 3}",
                    "x" if n % 2 else "",
                ]
            )
    return source


def options(folder: Path, out: Path, **changes: str | None) -> list[str]:
    words = {
        "csv": str(folder / "table.csv"), "image-column": "path", "text-column": "report", "client-column": "hospital",
        "group-column": "patient", "label-columns": "disease", "val-fraction": "0.25", "out": str(out),
    }  # fmt: skip
    words |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [word for key, value in words.items() if value is not None for word in (f"--{key}", value)]


def everything(dataset: Dataset) -> list[tuple[str, str, str, dict]]:
    """(client, split, text, info) of every sample."""
    out = []
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            part = dataset.samples(client, split)
            out += [(client, split, part.read_text(i).decode(), part.read_info(i)) for i in range(len(part))]
    return out


def test_a_table_becomes_a_dataset(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*options(folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "Next:" in printed
    assert f"--data.root {tmp_path / 'out'}" in printed
    dataset = open_dataset(tmp_path / "out")
    assert dataset.client_ids == ["H0", "H1", "H2"]
    samples = everything(dataset)
    assert sorted(text for _, _, text, _ in samples) == sorted(f"report, with a comma, number {n}" for n in range(60))
    for client, _, text, info in samples:
        n = int(text.split()[-1])
        assert (client, info["patient"], info["site"]) == (f"H{n % 3}", f"p{n // 3}", f"H{n % 3}")
        assert info["labels"] == {"disease": "x" if n % 2 else None}
        assert info["line"] == n + 2
    part = dataset.samples("H1", "train")
    numbers = [int(part.read_text(i).decode().split()[-1]) for i in range(len(part))]
    assert [part.read_image(i) for i in range(len(part))] == [encoded(n) for n in numbers], "bytes are kept"
    sides: dict[str, set[str]] = {}
    for _, split, _, info in samples:
        sides.setdefault(info["patient"], set()).add(split)
    assert all(len(side) == 1 for side in sides.values()), "a patient is on one side"
    assert [dataset.num_samples(c, "val") for c in dataset.client_ids] == [5, 5, 5]


def test_a_test_split_leaves_val_as_it_is_and_shares_no_patient(folder: Path, tmp_path: Path) -> None:
    assert run(*options(folder, tmp_path / "plain")) == 0
    assert run(*options(folder, tmp_path / "tested", test_fraction="0.25")) == 0
    plain, tested = (open_dataset(tmp_path / name) for name in ("plain", "tested"))
    val = [sorted(text for _, split, text, _ in everything(d) if split == "val") for d in (plain, tested)]
    assert val[0] == val[1]
    assert [tested.num_samples(c, "test") for c in tested.client_ids] == [5, 5, 5]
    sides: dict[str, set[str]] = {}
    for _, split, _, info in everything(tested):
        sides.setdefault(info["patient"], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())


def test_the_seed_decides_and_is_all_that_decides(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(*options(folder, tmp_path / name, seed=seed)) == 0
    index = [(tmp_path / name / "H0" / "index.json").read_bytes() for name in "abc"]
    assert index[0] == index[1]
    assert index[0] != index[2]


def test_equal_reports_and_equal_pictures_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "i,t\n" + "".join(f"{n}.jpg,{'same report' if n < 9 else f'r{n}'}\n" for n in range(40))
    )
    for n in range(40):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(10 if 10 <= n < 16 else n))
    words = options(tmp_path, tmp_path / "o", csv=str(tmp_path / "t.csv"), image_column="i", text_column="t", client_column=None,
                    group_column=None, label_columns=None)  # fmt: skip
    assert run(*words) == 0
    dataset = open_dataset(tmp_path / "o")
    assert dataset.client_ids == ["all"]
    assert dataset.num_samples("all", "val") == 10
    split_of = {info["line"] - 2: split for _, split, _, info in everything(dataset)}
    assert len({split_of[n] for n in range(9)}) == 1
    assert len({split_of[n] for n in range(10, 16)}) == 1


def test_a_report_that_everybody_shares_is_said_and_can_be_loosened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text(
        "i,t\n" + "".join(f"{n}.jpg,{'normal' if n < 36 else f'r{n}'}\n" for n in range(40))
    )
    for n in range(40):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(n))
    words = options(tmp_path, tmp_path / "o", csv=str(tmp_path / "t.csv"), image_column="i", text_column="t", client_column=None,
                    group_column=None, label_columns=None)  # fmt: skip
    assert run(*words) == 0
    assert (
        "no nearer split of all (4 of 40 pairs are val, 10 were wanted); --repeated-texts loosens it"
        in capsys.readouterr().out
    )
    assert run(*words, "--overwrite", "--repeated-texts") == 0
    assert "were wanted" not in capsys.readouterr().out
    assert open_dataset(tmp_path / "o").num_samples("all", "val") == 10


def bad_rows(folder: Path) -> None:
    (folder / "images" / "1.jpg").write_bytes(b"not an image")
    (folder / "images" / "2.jpg").unlink()
    (folder / "images" / "4.jpg").write_bytes(encoded(4)[:300])
    (folder / "images" / "5.jpg").write_bytes(huge_png(9600))
    lines = (folder / "table.csv").read_text().splitlines()
    lines[7] = 'images/6.jpg,"  ",H0,p2,'
    lines[8] = "images/7.jpg,short"
    lines[9] = ",no image,H2,p2,"
    lines[10] = "images/9.jpg,no client,,p3,"
    lines[11] = 'images/10.jpg,"a report\nover two lines",H1,p3,x'
    lines[13] = ""
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_rows_are_named_with_line_and_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_rows(folder)
    assert run(*options(folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    expected = [
        "table.csv line 3: corrupt image (images/1.jpg)",
        "table.csv line 4: image file cannot be read (images/2.jpg: No such file or directory)",
        "table.csv line 6: corrupt image (images/4.jpg)",
        "table.csv line 7: oversized image (images/5.jpg)",
        "table.csv line 8: empty text",
        "table.csv line 9: wrong number of cells (2 instead of 5)",
        "table.csv line 10: no image",
        "table.csv line 11: no client",
    ]
    assert "8 rows were left out" in printed
    assert [line.strip() for line in printed.splitlines() if " line " in line] == expected
    dataset = open_dataset(tmp_path / "out")
    assert len(everything(dataset)) == 51  # 60 less 8, and one line made blank
    assert dataset.info["skipped_rows"]["corrupt image"] == 2
    with (tmp_path / "out" / "skipped.csv").open() as file:
        assert [row["line"] for row in csv.DictReader(file)] == ["3", "4", "6", "7", "8", "9", "10", "11"]
    lines = {info["line"]: text for _, _, text, info in everything(dataset)}
    assert lines[12] == "a report\nover two lines"
    assert lines[16] == "report, with a comma, number 13", "lines are counted as an editor counts them"


def test_a_long_list_of_bad_rows_is_cut_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(30):
        (folder / "images" / f"{n}.jpg").unlink()
    assert run(*options(folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "30 rows were left out" in printed
    assert "… and 10 more" in printed


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"text_column": "reprot"},
            ["--text-column: {csv} has no column reprot; did you mean report? Its columns are: path, report, hospital"],
        ),
        ({"client_column": "Hospital"}, ["--client-column: {csv} has no column Hospital; did you mean hospital?"]),
        (
            {"image_column": "a", "group_column": "b", "label_columns": "disease,c"},
            [f"--{what}: {{csv}} has no column {name}" for what, name in
             (("image-column", "a"), ("group-column", "b"), ("label-columns", "c"))],
        ),
        ({"csv": "/nowhere/table.csv"}, ["--csv: cannot read /nowhere/table.csv: No such file or directory"]),
        (
            {"val_fraction": "1.5", "image_size": "2", "max_shard_bytes": "1"},
            ["--val-fraction: must be at least 0", "--image-size: must be at least 8", "--max-shard-bytes: must be at least"],
        ),
        ({"val_fraction": "0.5", "test_fraction": "0.5"}, ["--test-fraction: must be at least 0 and leave"]),
    ],
)  # fmt: skip
def test_mistakes_have_one_clear_line_each(folder: Path, tmp_path: Path, capsys, changes, lines) -> None:
    assert run(*options(folder, tmp_path / "out", **changes)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(lines)
    for error, line in zip(errors, lines, strict=True):
        assert error.startswith("feddra-ds: " + line.format(csv=folder / "table.csv"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; what comes first in it must name the columns"),
        ("path,report\nx,caf\xe9\n".encode("latin-1"), "is not UTF-8 (byte"),
        (b"path,report,report,hospital,patient,disease\n", "has two columns named report"),
        (b"path,report,hospital,patient,disease\nx,\"" + b"y" * 10_000_001 + b"\"\n", "field larger than field limit"),
        (b"path,report,hospital,patient,disease\n", "no row of"),
        (b"path,report,hospital,patient,disease\nx.jpg,r,h,p,d\n", "no row of"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(folder: Path, tmp_path: Path, capsys, content: bytes, message: str) -> None:
    (folder / "table.csv").write_bytes(content)
    assert run(*options(folder, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("feddra-ds: --csv: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_clients_that_would_share_a_folder_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    text = (folder / "table.csv").read_text().replace(",H1,", ",h0,")
    (folder / "table.csv").write_text(text)
    assert run(*options(folder, tmp_path / "out")) == 2
    assert "--client-column: 'H0' and 'h0' would share the folder h0" in capsys.readouterr().err


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_a_byte_order_mark(folder: Path, tmp_path: Path, delimiter: str) -> None:
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert run(*options(folder, tmp_path / "out")) == 0
    assert len(everything(open_dataset(tmp_path / "out"))) == 60


def test_site_column_and_shards_of_a_given_size(folder: Path, tmp_path: Path) -> None:
    assert (
        run(*options(folder, tmp_path / "out", site_column="disease", max_shard_bytes="65536", client_column=None)) == 0
    )
    dataset = open_dataset(tmp_path / "out")
    assert {info["site"] for *_, info in everything(dataset)} == {"x", ""}
    shards = dataset.shards("all")
    assert len(shards) > 3
    assert all(shard["bytes"] <= 65536 + tarfile.RECORDSIZE for _, shard in shards)


def stored(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_images_are_kept_shrunk_turned_or_made_png() -> None:
    jpeg, png = encoded(1, (100, 60)), encoded(1, (100, 60), "PNG")
    assert encode_image(jpeg, None) == (jpeg, "jpg", None)
    assert encode_image(png, 60) == (png, "png", None)
    small, suffix, _ = encode_image(jpeg, 30)
    assert (Image.open(io.BytesIO(small)).size, suffix) == ((50, 30), "jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    upright, *_ = encode_image(stored(Image.new("RGB", (100, 60)), "JPEG", exif=turned), None)
    assert Image.open(io.BytesIO(upright)).size == (60, 100)
    for form in ("BMP", "TIFF", "WEBP"):
        data, suffix, _ = encode_image(stored(Image.new("RGB", (20, 10), (9, 200, 30)), form), None)
        assert suffix == "png"
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - (9, 200, 30)).max() < 12
    deep = Image.fromarray((np.arange(6400).reshape(80, 80) * 10).astype(np.uint16))
    data, *_ = encode_image(stored(deep, "PNG"), 40)
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert (grey.min() < 10, grey.max() > 245) == (True, True)
    assert Image.open(io.BytesIO(encode_image(stored(Image.new("1", (64, 64), 1), "PNG"), 16)[0])).mode == "L"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: b"GIF89a", "corrupt_image"),
        (lambda: huge_png(), "oversized_image"),
        (lambda: huge_png(9600), "oversized_image"),
    ],
)
def test_images_that_cannot_be_stored(data: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        encode_image(data(), None)
    assert caught.value.reason == reason


# --- the split -------------------------------------------------------------------------------------------------------


def test_components_join_over_any_link() -> None:
    groups = components([["a"], ["b"], ["a", "c"], [], ["c", "d"], ["b"]])
    assert sorted(groups) == [[0, 2, 4], [1, 5], [3]]


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 25)), min_size=1, max_size=80),
    fraction=st.sampled_from([0.1, 0.25, 0.5]),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_groups_stay_whole_and_every_client_can_train(rows, fraction: float, seed: int) -> None:
    clients = [client for client, _ in rows]
    groups = components([[patient] for _, patient in rows])
    chosen = choose_validation(clients, groups, fraction, seed)
    for group in groups:
        assert len({bool(chosen[i]) for i in group}) == 1
    for client in set(clients):
        own = [i for i, c in enumerate(clients) if c == client]
        whole = [g for g in groups if set(g) <= set(own)]
        if len(whole) >= 2:
            assert 0 < sum(chosen[i] for i in own) < len(own), client


def test_the_fraction_is_met_where_groups_allow_it() -> None:
    clients = ["a"] * 400 + ["b"] * 40 + ["c"] * 3
    groups = components([[f"{c}{i // 4}"] for i, c in enumerate(clients)])
    for seed in range(5):
        chosen = choose_validation(clients, groups, 0.25, seed)
        assert chosen[:400].sum() == 100
        assert abs(int(chosen[400:440].sum()) - 10) <= 2
    assert not choose_validation(clients, groups, 0.0, 0).any()
    assert not choose_validation([], [], 0.5, 0).any()


def test_the_split_is_random_not_the_smallest_groups() -> None:
    clients = ["a"] * 300
    groups = components([[f"big{i // 10}" if i < 200 else f"small{i}"] for i in range(300)])
    shares = [choose_validation(clients, groups, 0.3, seed)[:200].sum() / 90 for seed in range(20)]
    assert 0.4 < np.mean(shares) < 0.9  # of 200/300 = 0.67
