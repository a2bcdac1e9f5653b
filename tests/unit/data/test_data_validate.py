"""`data validate` reads every byte: what is not as its index says is named, and so is each pair that cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import encoded

from feddra_ds.cli import main
from feddra_ds.data.format.writer import DatasetWriter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two clients of four pairs, one of them held out."""
    with DatasetWriter(tmp_path / "data") as writer:
        writer.held_out.append("far")
        for client in ("far", "near"):
            for n in range(4):
                text = "nan" if (client, n) == ("near", 3) else f"report {n}"
                writer.add(client, "train", f"k{n}", image=encoded(n), text=text, info={"patient": f"p{n}"})
    return tmp_path / "data"


def flip_a_byte(root: Path) -> None:
    with (root / "far" / "train-000000.tar").open("r+b") as file:
        file.seek(-2000, 2)
        file.write(b"?")


def change_rows(root: Path, change: str) -> None:
    """Change the index of `near`; its shard stays what it is."""
    path = root / "near" / "index.json"
    index = json.loads(path.read_text())
    rows = index["splits"]["train"]["samples"]
    first, second = rows[:2]
    if change == "of another":
        first["txt"], second["txt"] = second["txt"], first["txt"]
    elif change == "keys":
        first["key"], second["key"] = second["key"], first["key"]
    else:
        del rows[0]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (flip_a_byte, "/far/train-000000.tar: sha256 differs from index.json"),
        (lambda root: change_rows(root, "of another"), "/near/train-000000.tar: 2 of 4 samples are not where the index says"),
        (lambda root: change_rows(root, "keys"), "or are others: k1, k0; make the index again"),
        (lambda root: change_rows(root, "one less"), "has 4 samples, and the index lists 3"),
    ],
)  # fmt: skip
def test_what_is_not_as_the_index_says_is_a_problem(root: Path, damage, line: str, capsys) -> None:
    assert main(["data", "validate", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "note     near: 1 of 4 pairs are unreadable (1 no_report: k3)" in printed
    assert "ok       every shard is what its index says" in printed
    damage(root)
    assert main(["data", "validate", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM  " in printed
    assert line in printed


def test_shards_from_elsewhere_are_read_too(root: Path, tmp_path: Path, capsys) -> None:
    clients = {name: str(root / name) for name in ("far", "near")}
    config = {
        "data": {"clients": clients, "streaming": {"cache_dir": str(tmp_path / "cache")}, "max_bad_fraction": 0.0}
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["data", "validate", "--config", str(tmp_path / "c.yaml")]) == 1
    printed = capsys.readouterr().out
    assert (
        "PROBLEM  near: 1 of 4 pairs are unreadable (1 no_report: k3), more than data.max_bad_fraction (0%)" in printed
    )
    assert printed.count("PROBLEM") == 1
