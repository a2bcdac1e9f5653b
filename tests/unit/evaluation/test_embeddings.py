"""Embeddings as files: what was saved is read again by the formats' own libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from feddra_ds.evaluation.embeddings import Embeddings, check_path, save


@pytest.fixture
def some() -> Embeddings:
    rng = np.random.default_rng(0)
    tensors = {"image": rng.standard_normal((5, 3)).astype(np.float32), "text_id": np.arange(5)}
    return Embeddings({"client": ["north"] * 5, "key": [f"k{i}" for i in range(5)]}, tensors)


def test_safetensors(some: Embeddings, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = save(some, tmp_path / "x.safetensors", "runs/mine")
    with safe_open(out, "np") as file:
        about = file.metadata()
        for name, x in some.tensors.items():
            assert np.array_equal(file.get_tensor(name), x)
            assert file.get_tensor(name).dtype == x.dtype
    assert {name: json.loads(about[name]) for name in some.names} == some.names
    assert about["model"] == "runs/mine"
    assert list(tmp_path.iterdir()) == [out]


def test_parquet(some: Embeddings, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = save(some, tmp_path / "x.parquet", "runs/mine")
    table = parquet.read_table(out)
    assert table.column_names == ["client", "key", "image", "text_id"]
    assert table["key"].to_pylist() == some.names["key"]
    assert np.array_equal(np.array(table["image"].to_pylist(), dtype=np.float32), some.tensors["image"])
    assert table["text_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert table.schema.metadata[b"model"] == b"runs/mine"
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out: .*x.csv must end with .safetensors or .parquet"):
        check_path(tmp_path / "x.csv", "--out")
    with pytest.raises(ValueError, match=r"--out: .*none is not a folder"):
        check_path(tmp_path / "none" / "x.safetensors", "--out")
