"""`feddra-ds train` and `deepspeed launch/train.py` as a user runs them: real processes, real signals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import tree, write_dataset
from spawn import free_port

from feddra_ds.cli import main

REPOSITORY = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "feddra_ds", "train"]
LAUNCH = [sys.executable, "-m", "deepspeed.launcher.runner"]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


def write_config(path: Path, root: Path, out: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(tree(root, out, **changes)))
    return path


def train(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_four_mistakes_four_lines_and_no_process_group(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", root, tmp_path / "run")
    wrong = [
        "--run.sed",
        "1",
        "--data.batch_size",
        "0",
        "--dro.apply",
        "weights",
        "--deepspeed.scheduler",
        "{type: WarmupLR}",
    ]
    done = train("--config", config, *wrong)
    assert done.returncode == 2
    keys = [line.removeprefix("feddra-ds: ").split(":")[0] for line in done.stderr.strip().splitlines()]
    assert keys == ["run.sed", "data.batch_size", "dro.apply", "deepspeed.scheduler"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--clients.ids", "[north, nort]"], "nort"),
        (["--data.batch_size", "21"], "south"),
        (["--evaluation.split", "test"], "test"),
        (["--data.root", "/nowhere"], "/nowhere"),
        (["--run.output_dir", f"{__file__}/run"], "run.output_dir"),
        (["--topology.ranks_per_slot", "2"], "topology.ranks_per_slot"),
        (["--dro.fixed_weights", "[0.5, 0.5]"], "dro.fixed_weights"),
        (["--clients.minimum", "4"], "clients.minimum"),
        (["--model.text.pretrained", "/nowhere"], "model.text"),
        (["--model.num_top_blocks", "3"], "model.num_top_blocks"),
        (["nonsense"], "nonsense"),
        (["--data.batch_size"], "data.batch_size"),
    ],
)
def test_what_is_wrong_is_named(
    root: Path, tmp_path: Path, arguments: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", root, tmp_path / "run")
    assert main(["train", "--config", str(config), *arguments]) == 2
    told = capfd.readouterr().err
    assert expected in told
    assert "Traceback" not in told
    assert not torch.distributed.is_initialized()


def test_print_config_shows_the_resolved_tree(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", root, tmp_path / "run")
    done = train("--config", config, "--optimizer.lr=1e-3", "--print_config")
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
    assert resolved["optimizer"]["lr"] == 1e-3
    assert resolved["dro"]["step_size"] == 0.5


def test_run_directory_and_a_model_that_needs_no_deepspeed(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", root, out, run__trackers=["tensorboard"], schedule__rounds=3, checkpoint__keep=2
    )
    done = train("--config", config)
    assert done.returncode == 0, done.stderr
    told = lines(out)
    assert [line["round"] for line in told] == [0, 1, 2]
    for line, following in itertools.pairwise(told):
        assert line["next_client_weights"] == following["client_weights"]
    last = told[-1]
    assert last["client_ids"] == ["north", "south", "west"]
    assert sum(last["client_weights"]) == pytest.approx(1)
    assert last["worst_loss"] == max(last["client_losses"])
    assert last["samples"] == 3 * 5 * 8
    assert set(last["stage_seconds"]) == {"stage1", "stage2", "aggregate", "evaluate", "checkpoint"}
    assert set(last["stage_bytes_sent"]) == set(last["stage_memory_bytes"]) == {"stage1", "stage2"}
    assert all(0 < number <= max(last["peak_memory_bytes"]) for number in last["stage_memory_bytes"].values())
    assert set(last["val"]) == {"north", "south", "west", "all"}
    assert last["val"]["all"]["pairs"] == 18
    assert 0 < last["val"]["all"]["chance@5"] <= 1
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["round-000001", "round-000002"]
    assert list((out / "events").rglob("events.out.tfevents.*"))
    assert yaml.safe_load((out / "config.yaml").read_text())["schedule"]["rounds"] == 3
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import torch, feddra_ds\nfrom PIL import Image\n"
        f"model, processor = feddra_ds.load_pretrained({str(out / 'model')!r})\n"
        "batch = processor(images=[Image.new('L', (50, 40)), Image.new('RGB', (9, 9))], text=['opacity', 'a nodule, 3 mm'],"
        " return_tensors='pt', padding=True)\n"
        "with torch.no_grad(): o = model(**batch)\n"
        "assert o.image_embeds.shape == o.text_embeds.shape == (2, 16), o.image_embeds.shape\n"
        "assert torch.allclose(o.image_embeds.norm(dim=-1), torch.ones(2)) and not model.training"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert loaded.returncode == 0, loaded.stderr


def start_and_wait_for(command: list[str], out: Path, num_lines: int, limit_s: float = 180) -> subprocess.Popen[str]:
    """Start a run and return once its metrics have `num_lines` lines."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        cwd=REPOSITORY,
    )
    deadline = time.monotonic() + limit_s
    while not (out / "metrics.jsonl").exists() or len(lines(out)) < num_lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {num_lines} rounds in {limit_s} s"
        time.sleep(0.02)
    return process


SAME = ("round", "client_weights", "next_client_weights", "client_losses", "samples", "val")


@pytest.mark.slow
def test_sigterm_then_the_same_command_goes_on(root: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    many = {"schedule__rounds": 5, "optimizer__name": "adamw", "optimizer__lr": 1e-3}
    assert train("--config", write_config(tmp_path / "w.yaml", root, whole, **many)).returncode == 0
    config = write_config(tmp_path / "c.yaml", root, cut, **many)
    process = start_and_wait_for([*TRAIN, "--config", str(config)], cut, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command goes on" in output
    again = train("--config", config)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stderr
    assert [{k: line[k] for k in SAME} for line in lines(cut)] == [{k: line[k] for k in SAME} for line in lines(whole)]


def launched(config: Path, ranks: int) -> list[str]:
    return [
        *LAUNCH,
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(REPOSITORY / "launch" / "train.py"),
        "--config",
        str(config),
    ]


@pytest.mark.slow
def test_deepspeed_launcher_two_slots_of_two_ranks_equals_one_process(root: Path, tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    assert train("--config", write_config(tmp_path / "1.yaml", root, one)).returncode == 0
    shape = {"topology__ranks_per_slot": 2, "deepspeed": {"zero_optimization": {"stage": 2}}}
    command = launched(write_config(tmp_path / "4.yaml", root, four, **shape), 4)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(lines(one), lines(four), strict=True):
        assert b["client_losses"] == pytest.approx(a["client_losses"], abs=1e-4)
        assert b["next_client_weights"] == pytest.approx(a["next_client_weights"], abs=1e-4)
        assert b["val"]["all"]["pairs"] == a["val"]["all"]["pairs"]
        assert sum(b["stage_bytes_sent"].values()) == b["bytes_sent_per_rank"] > 0
        assert len(b["peak_memory_bytes"]) == 4


def start_two_ranks(root: Path, tmp_path: Path) -> tuple[Path, subprocess.Popen[str]]:
    """The folder of a run that would not end for long, and its launcher, once a round is done."""
    out, shape = tmp_path / "run", {"topology__ranks_per_slot": 1, "schedule__rounds": 500}
    config = write_config(tmp_path / "c.yaml", root, out, **shape)
    return out, start_and_wait_for(launched(config, 2), out, 1)


def second_rank_of(out: Path) -> int:
    """Its process."""
    return max(
        int(pid.name)
        for pid in Path("/proc").iterdir()
        if pid.name.isdigit() and b"--local_rank=1" in _command_of(pid) and str(out.parent).encode() in _command_of(pid)
    )


@pytest.mark.slow
def test_sigusr1_to_one_rank_ends_all_after_a_checkpoint(root: Path, tmp_path: Path) -> None:
    out, shape = tmp_path / "run", {"schedule__rounds": 500, "checkpoint__every": 1000}
    process = start_and_wait_for(launched(write_config(tmp_path / "c.yaml", root, out, **shape), 2), out, 1)
    os.kill(second_rank_of(out), signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    done = len(lines(out))
    assert f"stopped after round {done - 1}, with a checkpoint, as SIGUSR1 asked" in output
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"round-{done - 1:06d}"]
    assert not (out / "model").exists()
    assert json.loads((out / "progress.json").read_text())["state"] == "stopped"
    again = train("--config", tmp_path / "c.yaml", "--schedule.rounds", done + 1)
    assert again.returncode == 0, again.stderr
    assert len(lines(out)) == done + 1


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(root: Path, tmp_path: Path) -> None:
    out, process = start_two_ranks(root, tmp_path)
    victim = second_rank_of(out)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    output = process.communicate(timeout=90)[0]
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert str(victim) in output  # the launcher names the process that died


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_orphan(root: Path, tmp_path: Path) -> None:
    """`deepspeed` itself is killed; its helper, which lives on, and the ranks end by themselves."""
    _, process = start_two_ranks(root, tmp_path)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3  # the helper and two ranks
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    _, left = psutil.wait_procs(below, timeout=60)
    assert not left


def _command_of(pid: Path) -> bytes:
    try:
        return (pid / "cmdline").read_bytes()
    except OSError:
        return b""
