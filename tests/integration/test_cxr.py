"""Real radiographs and clinical notes, five regions, from scratch, by the commands of configs/cxr_regions.yaml."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from feddra_ds.strategies.robust_weights import chi2_divergence

REPOSITORY = Path(__file__).parents[2]
CXR = REPOSITORY.parent / "shared" / "data" / "cxr"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not CXR.is_dir(), reason="the chest radiographs are not beside this checkout"),
]


def feddra(*arguments: object, timeout: float = 1800) -> str:
    command = [sys.executable, "-m", "feddra_ds", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def convert(table: Path, out: Path) -> None:
    columns = (
        "--image-column",
        "image",
        "--text-column",
        "text",
        "--client-column",
        "region5",
        "--group-column",
        "patient",
    )
    feddra("data", "convert", "--csv", table, *columns, "--val-fraction", 0.25, "--image-size", 128, "--out", out)


def train(data: Path, out: Path, rounds: int, *more: object) -> list[dict]:
    settings = ("--data.root", data, "--run.output_dir", out, "--schedule.rounds", rounds, "--evaluation.every", rounds)
    feddra("train", "--config", "configs/cxr_regions.yaml", *settings, *more)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def pooled(run: Path, data: Path, split: str) -> dict:
    told = json.loads(feddra("evaluate", run, "--data", data, "--split", split, "--json", "--no-zero-shot"))
    return told["pooled"]


@pytest.mark.slow
def test_a_round_of_it(tmp_path: Path) -> None:
    convert(CXR / "metadata.csv", tmp_path / "data")
    steps = ("--schedule.stage1_steps", 1, "--schedule.stage2_steps", 1)
    (told,) = train(tmp_path / "data", tmp_path / "run", 1, *steps)
    assert len(told["client_train_losses"]) == 5
    assert not told["excluded_clients"]
    assert pooled(tmp_path / "run", tmp_path / "data", "val")["pairs"] >= 60


@pytest.mark.exhaustive
def test_it_learns_the_training_pairs(tmp_path: Path) -> None:
    convert(CXR / "metadata.csv", tmp_path / "data")
    told = train(tmp_path / "data", tmp_path / "run", 10)
    first, last = (sum(line["client_train_losses"]) / 5 for line in (told[0], told[-1]))
    assert last < first - 1.5
    for line in told:
        p = line["client_weights"]
        assert sum(p) == pytest.approx(1)
        assert min(p) >= 0
        assert chi2_divergence(p) <= 1 + 1e-9
    seen = pooled(tmp_path / "run", tmp_path / "data", "train")
    for way in ("i2t", "t2i"):
        assert seen[f"{way}_recall@10"] >= 4 * seen["chance@10"]


@pytest.mark.exhaustive
def test_a_shuffled_control_does_not_generalise(tmp_path: Path) -> None:
    with open(CXR / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [row["text"] for row in rows]
    random.Random(0).shuffle(texts)
    with open(tmp_path / "shuffled.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row, text in zip(rows, texts, strict=True):
            writer.writerow({**row, "text": text, "image": CXR / row["image"]})
    convert(tmp_path / "shuffled.csv", tmp_path / "control")
    train(tmp_path / "control", tmp_path / "control_run", 6)
    control = pooled(tmp_path / "control_run", tmp_path / "control", "val")
    found = control["intervals"]["recall@10"]
    assert found["low"] <= found["chance"] or found["recall"] < 1.3 * found["chance"]
