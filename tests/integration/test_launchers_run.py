"""One run under each launcher that is there, in real processes: the same losses, also after a rank was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import metrics_of, tree, write_dataset
from spawn import free_port

BIN = Path(sys.executable).parent
MODULE = ["-m", "feddra_ds", "train", "--config"]
# rank 1 of the first attempt dies once a round is written
DIES_ONCE = """
import os, signal, sys, threading, time
from pathlib import Path
from feddra_ds.cli import main

def die(metrics):
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
        threading.Thread(target=die, args=[Path(sys.argv.pop(1))], daemon=True).start()
    else:
        sys.argv.pop(1)
    raise SystemExit(main(["train", "--config", *sys.argv[1:]]))
"""


def start(command: list[Any], **variables: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {name: str(value) for name, value in variables.items()}
    words = [str(word) for word in command]
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(process: subprocess.Popen[str]) -> str:
    """What it said; it must have ended well."""
    try:
        said, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_srun_accelerate_and_a_restarted_torchrun_train_one_run_each(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d")
    configs = {}
    for name in ("slurm", "accelerate", "torchrun"):
        shape = {"topology__ranks_per_slot": 1, "clients__timeout_s": 60.0, "topology__interface": "lo"}
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tree(root, tmp_path / name, **shape)))

    slurm = {"SLURM_NTASKS": 2, "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_JOB_NODELIST": "localhost"}
    tasks = [
        start([sys.executable, *MODULE, configs["slurm"]],
              SLURM_PROCID=rank, SLURM_LOCALID=rank, MASTER_PORT=port, **slurm)
        for port in [free_port()] for rank in (0, 1)
    ]  # fmt: skip
    said = [end(task) for task in tasks]
    assert "slot rank  memory" in said[0]
    assert "slot rank" not in said[1]
    expected = metrics_of(tmp_path / "slurm")
    assert [line["round"] for line in expected] == [0, 1]

    launcher = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    end(start([*launcher, *MODULE, configs["accelerate"]]))
    assert metrics_of(tmp_path / "accelerate") == expected

    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    launcher = [BIN / "torchrun", "--nproc_per_node", "2", "--max_restarts", "1", "--master_port", free_port()]
    metrics = tmp_path / "torchrun" / "metrics.jsonl"
    said_by_torchrun = end(start([*launcher, tmp_path / "dies_once.py", metrics, configs["torchrun"]]))
    assert "resuming from" in said_by_torchrun
    assert metrics_of(tmp_path / "torchrun") == expected
