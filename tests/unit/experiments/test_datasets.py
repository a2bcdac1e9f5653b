"""The dataset of a seed: made once, made again when the recipe changes, another for another seed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_spec import SPEC

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.progress import untracked
from feddra_ds.experiments.runner import Options, _dataset, _shuffled
from feddra_ds.experiments.spec import Spec


def make(tmp_path: Path, source: dict[str, Any], seed: int = 0, **options: Any) -> Path:
    spec = Spec.model_validate(SPEC | {"data": source})
    return Path(_dataset(spec, seed, Options(tmp_path / "out", 1, **options), untracked))


def test_synthetic_data_are_made_once_a_seed_and_recipe(tmp_path: Path) -> None:
    recipe = {"synth": {"num_pairs": 20, "image_size": 16, "test_pairs": 2}}
    first = make(tmp_path, recipe)
    born = (first / "dataset.json").stat().st_mtime_ns
    assert make(tmp_path, recipe) == first
    assert (first / "dataset.json").stat().st_mtime_ns == born
    assert make(tmp_path, recipe, seed=1) != first
    recipe["synth"]["test_pairs"] = 3
    assert open_dataset(make(tmp_path, recipe)).num_samples("heart_centre", "test") == 3


def test_a_control_has_the_same_split_and_train_texts_of_other_images(tmp_path: Path) -> None:
    root = make(tmp_path, {"synth": {"num_pairs": 60, "image_size": 16, "test_pairs": 4}})
    control = Path(_shuffled(str(root), 0, Options(tmp_path / "out", 1)))
    texts = {}
    for name, at in (("arm", root), ("control", control)):
        parts = {split: open_dataset(at).samples("heart_centre", split) for split in ("train", "test")}
        texts[name] = {split: [part.read_text(i) for i in range(len(part))] for split, part in parts.items()}
    assert texts["arm"]["test"] == texts["control"]["test"]
    assert texts["arm"]["train"] != texts["control"]["train"]
    assert sorted(texts["arm"]["train"]) == sorted(texts["control"]["train"])


def test_a_table_is_split_anew_for_each_seed(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["i", "t", "c", "p"])
        for n in range(40):
            Image.fromarray(np.random.default_rng(n).integers(0, 255, (16, 16), dtype=np.uint8)).save(
                tmp_path / f"{n}.png"
            )
            table.writerow([f"{n}.png", f"report {n}", f"c{n % 2}", f"p{n}"])
    recipe = {"convert": {"csv": "nowhere.csv", "image_column": "i", "text_column": "t", "client_column": "c",
                          "group_column": "p", "val_fraction": 0.2, "test_fraction": 0.3}}  # fmt: skip
    tests = []
    for seed in (0, 1):
        dataset = open_dataset(make(tmp_path, recipe, seed, csv=str(tmp_path / "t.csv")))
        assert [dataset.num_samples("c0", split) for split in ("train", "val", "test")] == [10, 4, 6]
        part = dataset.samples("c0", "test")
        tests.append({part.read_text(i) for i in range(len(part))})
    assert tests[0] != tests[1]


def test_a_dataset_that_is_there_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert make(tmp_path, {"synth": {}}, data=str(tmp_path / "mine")) == tmp_path / "mine"
    with pytest.raises(DataError, match="--data: "):
        make(tmp_path, {"synth": {}}, data=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"data\.path: "):
        make(tmp_path, {"path": str(tmp_path / "gone")})
