"""The shard contract: what the writer writes, the reader and webdataset read; preflight names every problem."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from data_helpers import encoded, make_dataset, preflight_lines

from feddra_ds.cli import main
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.format.writer import DatasetWriter, index_folder, safe_name

CHECK = {"batch_size": 4, "eval_batch_size": 2, "eval_split": "val", "verify": False}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_dataset(
        tmp_path / "data", {"alpha": {"train": 12, "val": 3}, "beta": {"train": 5, "val": 2}}, max_shard_bytes=9000
    )
    return tmp_path / "data"


def test_members_come_back_by_offset_as_tarfile_reads_them(root: Path) -> None:
    dataset = open_dataset(root)
    assert dataset.client_ids == ["alpha", "beta"]
    samples = dataset.samples("alpha", "train")
    assert len(samples) == dataset.num_samples("alpha", "train") == 12
    assert len(set(samples.shard.tolist())) > 1, "this test wants several shards"
    for index in reversed(range(12)):
        with tarfile.open(samples.paths[samples.shard[index]]) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar if m.name.startswith(samples.keys[index])}
        key = samples.keys[index]
        assert samples.read_image(index) == content[f"{key}.jpg"] == encoded(index)
        assert samples.read_text(index) == content[f"{key}.txt"]
        assert samples.read_info(index) == json.loads(content[f"{key}.json"])
        assert samples.text_ids[index] == text_id(f"report {index} of alpha")


def test_webdataset_reads_the_shards(root: Path) -> None:
    import webdataset

    paths = open_dataset(root).samples("alpha", "train").paths
    keys = [s["__key__"] for s in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)]
    assert keys == [f"train{n:04d}" for n in range(12)]


def test_the_same_samples_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    make_dataset(
        tmp_path / "again", {"alpha": {"train": 12, "val": 3}, "beta": {"train": 5, "val": 2}}, max_shard_bytes=9000
    )
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(files) > 5
    for file in files:
        assert (root / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_text_ids_ignore_white_space_only() -> None:
    assert text_id("no  acute\n finding ") == text_id("no acute finding")
    assert text_id("no acute finding") != text_id("No acute finding")
    assert 0 <= text_id("") < 2**63


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with DatasetWriter(tmp_path / "data") as writer:
            writer.add("a", "train", "k", image=encoded(0), text="x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_works(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "data").__enter__()
    writer.add("a", "train", "k", image=encoded(0), text="x")
    assert not (tmp_path / "data").exists()  # and here the process dies
    make_dataset(tmp_path / "data", {"b": {"train": 1}})
    assert open_dataset(tmp_path / "data").client_ids == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_an_existing_folder_is_kept_unless_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--out: .* exists already"):
        DatasetWriter(root)
    with DatasetWriter(root, overwrite=True) as writer:
        writer.add("new", "train", "k", image=encoded(0), text="x")
    assert open_dataset(root).client_ids == ["new"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not a dataset and --overwrite leaves it alone"):
        DatasetWriter(tmp_path / "precious", overwrite=True)


def test_held_out_clients_are_not_trained_on_unless_named(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        writer.held_out.append("far")
        for client in ("near", "far"):
            writer.add(client, "train", f"{client}0", image=encoded(0), text="x")
    dataset = open_dataset(tmp_path / "data")
    assert (dataset.client_ids, dataset.held_out) == (["near"], ["far"])
    assert open_dataset(tmp_path / "data", ["far"]).client_ids == ["far"]
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["held_out"] == ["far"]


def test_client_names_become_safe_folders() -> None:
    assert safe_name(" St. Mary's / A&E ") == "St_Mary_s_A_E"
    assert safe_name("../../etc") == "etc"
    assert safe_name("日本") == "_"


def test_a_dataset_without_problems(root: Path) -> None:
    assert preflight_lines(root, None, **CHECK | {"verify": True}) == []
    assert preflight_lines(root, ["beta"], **CHECK) == []


def test_missing_root_and_missing_client(root: Path) -> None:
    (line,) = preflight_lines(root.parent / "dat", None, **CHECK)
    assert line.startswith("data.root: ")
    assert line.endswith(f"is not a folder; did you mean {root}?")
    (line,) = preflight_lines(root, ["alpha", "betta"], **CHECK)
    assert line == f"clients.ids: no client betta under {root}; did you mean beta? there are: alpha, beta"
    with pytest.raises(DataError, match="no client gamma"):
        open_dataset(root, ["gamma"])
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset(root / "nowhere")


def test_a_client_whose_folder_is_gone_is_missed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "beta")
    (line,) = preflight_lines(root, None, **CHECK)
    assert "dataset.json names beta, but there is no such folder" in line
    assert preflight_lines(root, ["alpha"], **CHECK) == []  # said by the user
    assert main(["data", "inspect", str(root)]) == 1
    assert "dataset.json names beta" in capsys.readouterr().out


def test_a_root_without_clients(tmp_path: Path) -> None:
    (line,) = preflight_lines(tmp_path, None, **CHECK)
    assert "no folder under" in line
    make_dataset(tmp_path / "data", {"a": {"train": 4, "val": 1}})
    (line,) = preflight_lines(tmp_path / "data", [], **CHECK)
    assert line.startswith("clients.ids: ")


def test_counts_that_cannot_work_are_named(root: Path, tmp_path: Path) -> None:
    small, _ = preflight_lines(root, None, **CHECK | {"batch_size": 6, "eval_split": "test"})
    assert small.startswith("data.batch_size: fewer train pairs than a batch of 6: beta (5); lower")
    lines = preflight_lines(root, None, **CHECK | {"eval_batch_size": 9, "eval_split": None})
    assert lines == ["dro.evaluation_batch_size: fewer train pairs than 9: beta (5); set it to 5 or less"]
    (line,) = preflight_lines(root, None, **CHECK | {"eval_split": "test"})
    assert line.startswith(
        "evaluation.split: no test split: alpha, beta; convert with --val-fraction, or set evaluation.every=0"
    )
    assert preflight_lines(root, None, **CHECK | {"batch_size": 17}, pooled=True) == []
    (line,) = preflight_lines(root, None, **CHECK | {"batch_size": 18}, pooled=True)
    assert "alpha+beta (17)" in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(p, 4096), r"was half written or changed: 4096 bytes, not \d+"),
        (lambda p: os.truncate(p, 0), "is empty: 0 bytes"),
        (lambda p: p.unlink(), "is missing, though index.json lists it with"),
    ],
)
def test_damaged_shards_are_named(root: Path, damage, message: str) -> None:
    path = root / "alpha" / "train-000000.tar"
    damage(path)
    (line,) = preflight_lines(root, None, **CHECK)
    assert line.startswith(f"{path}: ")
    assert re.search(message, line), line


def test_a_changed_byte_is_found_by_verify_only(root: Path) -> None:
    path = root / "beta" / "val-000000.tar"
    with path.open("r+b") as file:
        file.seek(700)
        file.write(b"\x00\x01\x02")
    assert preflight_lines(root, None, **CHECK) == []
    seen: list[str] = []
    (line,) = preflight_lines(root, None, **CHECK | {"verify": True}, progress=seen.append)
    assert line.startswith(f"{path}: sha256 differs from index.json")
    assert "beta/val-000000.tar" in seen
    path.unlink()
    (line,) = open_dataset(root, ["beta"]).verify()
    assert "cannot be read" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("alpha/index.json", '{"version": 1, "splits": {"train": ', "Invalid JSON: EOF.*was it cut off"),
        ("alpha/index.json", '{"version": 99, "splits": {}}', "is not a feddra-shards file of version 1"),
        ("dataset.json", "[1, 2]", "is not a feddra-shards file"),
    ],
)
def test_broken_json_is_named(root: Path, name: str, content: str, message: str) -> None:
    (root / name).write_text(content)
    lines = preflight_lines(root, None, **CHECK)
    assert len(lines) == 1
    assert lines[0].startswith(f"{root / name}: ")
    assert re.search(message, lines[0])


def test_an_empty_shard_is_named(root: Path) -> None:
    index = json.loads((root / "alpha" / "index.json").read_text())
    index["splits"]["val"]["shards"][0]["samples"] = 0
    (root / "alpha" / "index.json").write_text(json.dumps(index))
    (line,) = preflight_lines(root, None, **CHECK)
    assert line.startswith(f"{root / 'alpha' / 'val-000000.tar'}: is an empty shard")


def test_an_unreadable_index_is_named(root: Path) -> None:
    (root / "alpha" / "index.json").unlink()
    (root / "alpha" / "index.json").mkdir()
    lines = preflight_lines(root, ["alpha"], **CHECK)
    assert lines[0].startswith("clients.ids: no client alpha")
    dataset = open_dataset(root, ["beta"])
    (root / "beta" / "index.json").unlink()
    with pytest.raises(DataError, match=r"index.json: cannot be read: No such file"):
        dataset.index("beta")


def test_a_missing_split_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="client alpha has no test split; it has train, val"):
        open_dataset(root).samples("alpha", "test")


def test_tars_made_elsewhere_get_an_index(root: Path, tmp_path: Path) -> None:
    before = open_dataset(root).samples("alpha", "train")
    (root / "alpha" / "index.json").rename(tmp_path / "old.json")
    (line,) = preflight_lines(root, ["alpha"], **CHECK)
    assert line.startswith("clients.ids: no client alpha")
    assert index_folder(root / "alpha") == {"train": 12, "val": 3}
    after = open_dataset(root).samples("alpha", "train")
    assert (after.keys, after.text_ids.tolist()) == (before.keys, before.text_ids.tolist())
    assert [after.read_image(i) for i in range(12)] == [before.read_image(i) for i in range(12)]
    assert json.loads((root / "alpha" / "index.json").read_text()) == json.loads((tmp_path / "old.json").read_text())


def test_a_folder_of_bare_tars_is_pointed_to_the_indexer(root: Path) -> None:
    for name in ("alpha", "beta"):
        (root / name / "index.json").unlink()
    (line,) = preflight_lines(root, None, **CHECK)
    assert "alpha has no index.json; `feddra-ds data inspect" in line
    os.truncate(root / "alpha" / "train-000000.tar", 1000)
    with pytest.raises(DataError, match=r"train-000000.tar: is not a whole, uncompressed tar"):
        index_folder(root / "alpha")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no .tar shards"):
        index_folder(root / "empty")


def test_no_member_but_the_five_kinds_is_indexed(tmp_path: Path) -> None:
    """A pickle or a program in a shard is not even listed."""
    folder = tmp_path / "a"
    folder.mkdir()
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for name, data in (("k.jpg", encoded(0)), ("k.txt", b"x"), ("k.pyd", b"boom"), ("k.pkl", b"boom")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index_folder(folder)
    (row,) = json.loads((folder / "index.json").read_text())["splits"]["train"]["samples"]
    assert set(row) == {"key", "shard", "jpg", "txt", "text_id"}
