"""Experiments as a user runs them: real trainings in worker processes, a crash as a row, a kill that costs one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from feddra_ds.cli import main

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TINY: dict[str, Any] = {
    "name": "tiny",
    "base": "quickstart",
    "data": {"synth": {"num_pairs": 60, "image_size": 16, "test_pairs": 8, "val_fraction": 0.3, "sizes": "even"}},
    "common": {
        "model": {"vision": {"config": {"model_type": "vit", "patch_size": 8, **BODY}},
                  "text": {"config": {"model_type": "bert", **BODY}}, "embedding_dim": 8},
        "data": {"image_size": 16, "text_length": 16, "batch_size": 4},
        "dro": {"evaluation_pairs": 4, "evaluation_batch_size": 4},
        "schedule": {"rounds": 1, "stage1_steps": 0, "stage2_steps": 1},
        "run.trackers": [],
    },
    "arms": {"fedavg": {"strategy.name": "fedavg"}, "broken": {"optimizer": {"name": "sgd", "lr": 1e30}}},
    "seeds": {"dev": [3], "test": [4, 5, 6]},
    "baseline": "fedavg",
    "metrics": ["recall@5", "worst_recall@5", "held_out_recall@5", "loss"],
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return path


def rows_of(out: Path) -> list[dict[str, Any]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_rows_crashes_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["experiment", "run", str(write(tmp_path)), "--out", str(out), "--workers", "1"]
    assert main(command) == 1
    said = capsys.readouterr().out
    good, bad = rows_of(out)
    assert (good["arm"], good["seed"], good["kind"], good["status"]) == ("fedavg", 3, "dev", "ok")
    assert {"recall@5", "recall@1/heart_centre", "held_out_recall@5", "loss", "worst_loss", "largest_p"} <= set(
        good["metrics"]
    )
    assert set(good["versions"]) == {"feddra_ds", "torch", "deepspeed"}
    assert bad["status"] == "crashed"
    assert "finite" in bad["reason"]
    assert "broken, seed 3: CRASHED" in said
    run = out / "runs" / "fedavg-seed3"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "log.txt"}
    assert not (run / "checkpoints").exists()
    assert not (run / "model").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run"]["seed"] == 3
    assert "seed 3" in json.loads((Path(config["data"]["root"]) / "dataset.json").read_text())["source"]

    only = [*command, "--arms", "fedavg"]
    assert main(only) == 0, "nothing is left to do"
    assert len(rows_of(out)) == 2
    capsys.readouterr()
    assert main(["experiment", "table", str(write(tmp_path)), "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert f"| fedavg | {100 * good['metrics']['recall@5']:.1f} |" in table
    assert "Crashed: broken (seeds 3)." in table


FOUR = {"arms": {"fedavg": {"strategy.name": "fedavg"}, "feddra": {}}, "seeds": {"dev": [1, 2]}}


def start(path: Path, out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "feddra_ds", "experiment", "run", str(path), "--out", str(out), *words]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_kill_costs_the_run_that_was_on(tmp_path: Path) -> None:
    path, out = write(tmp_path, **FOUR), tmp_path / "out"
    first = start(path, out, "--workers", "1")
    deadline = time.monotonic() + 240
    while len(rows_of(out)) < 1:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(first.pid).children(recursive=True)
    assert main(["experiment", "run", str(path), "--out", str(out)]) == 2, "two at a time would mix their runs"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1], "nothing runs on after its parent"
    done = rows_of(out)
    assert 1 <= len(done) < 4
    assert start(path, out, "--workers", "1").wait(300) == 0
    after = rows_of(out)
    assert after[: len(done)] == done
    assert sorted(row["id"] for row in after) == ["fedavg-seed1", "fedavg-seed2", "feddra-seed1", "feddra-seed2"]


@pytest.mark.slow
def test_a_worker_that_dies_is_a_row_and_is_replaced(tmp_path: Path) -> None:
    path, out = write(tmp_path, **FOUR), tmp_path / "out"
    parent = start(path, out, "--workers", "1")
    deadline = time.monotonic() + 240
    while not (out / "runs" / "fedavg-seed1" / "log.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (worker,) = [p for p in psutil.Process(parent.pid).children() if "worker" in " ".join(p.cmdline())]
    worker.kill()
    assert parent.wait(300) == 1
    rows = {row["id"]: row for row in rows_of(out)}
    assert rows["fedavg-seed1"]["status"] == "crashed"
    assert "status -9" in rows["fedavg-seed1"]["reason"]
    assert [rows[name]["status"] for name in ("feddra-seed1", "fedavg-seed2", "feddra-seed2")] == ["ok"] * 3


@pytest.mark.exhaustive
def test_workers_and_launches_give_the_same_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, arms={"fedavg": {"strategy.name": "fedavg"}}, seeds={"dev": [1, 2]})
    for name, words in (("one", ["--workers", "1"]), ("two", ["--workers", "2"]), ("launched", ["--ranks", "1"])):
        assert start(path, tmp_path / name, *words).wait(400) == 0
    numbers = [{row["seed"]: row["metrics"] for row in rows_of(tmp_path / name)} for name in ("one", "two", "launched")]
    assert numbers[0] == numbers[1]
    for seed in (1, 2):
        assert numbers[2][seed] == pytest.approx(numbers[0][seed], abs=1e-5)


@pytest.mark.slow
def test_what_an_arm_reads_is_kept_until_the_end(tmp_path: Path) -> None:
    arms = {
        "local": {"strategy.name": "fedavg"},
        "reads": {"strategy.name": "fedavg", "model": {"pretrained": "{run:local}/model"}},
    }
    path, out = write(tmp_path, arms=arms, baseline=None), tmp_path / "out"
    assert start(path, out, "--workers", "2").wait(300) == 0
    assert [row["id"] for row in rows_of(out)] == ["local-seed3", "reads-seed3"]
    assert not (out / "runs" / "local-seed3" / "model").exists()
