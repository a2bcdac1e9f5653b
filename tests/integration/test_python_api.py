"""`feddra_ds.train` as a script or a notebook calls it: real processes, and a process that trains more than once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import metrics_of, same_bits, tree, weights_of, write_dataset, zero
from spawn import free_port

import feddra_ds
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.logs import logger

TESTS = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# DS_ACCELERATOR, LOCAL_RANK and TOKENIZERS_PARALLELISM are not set: the run sets them, and takes them back.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS / "distributed")]),
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "HOME": os.environ.get("HOME", "/"),
}
MORE = {"optimizer__name": "adamw", "optimizer__lr": 1e-3}

# What a caller's process must look like after a call as before it.
STATE = """
import gc, json, logging, os, random, signal, sys, threading
import numpy as np, torch
from pathlib import Path
import feddra_ds
from feddra_ds.common.logs import logger

def state():
    root = logging.getLogger()
    return {
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "log": [len(logger.handlers), logger.level, logger.propagate, len(root.handlers), root.level],
        "environment": {k: v for k, v in os.environ.items() if "TORCH" not in k},  # torch sets some of its own
        "random": [str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()],
        "linear": str(torch.nn.functional.linear),
        "group": torch.distributed.is_initialized(),
        "streams": [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
    }

def alive():
    gc.collect()
    kinds = ("DeepSpeedEngine", "Engine", "DualEncoder", "Topology", "DecodePool", "SummaryWriter")
    return [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in kinds]

before = state()
def unchanged():
    now = state()
    return [key for key in before if now[key] != before[key]]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


def python(script: str, *arguments: str | Path, timeout: float = 500) -> Any:
    """What a script prints last, read as JSON; run in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_public_names_are_listed_and_cost_nothing() -> None:
    assert {"train", "load_pretrained", "__version__"} <= set(dir(feddra_ds)) == set(feddra_ds.__all__)
    heavy = "('torch', 'transformers', 'deepspeed')"
    script = (
        f"import feddra_ds, json, sys; feddra_ds.train; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    )
    assert python(script) == []
    assert all(callable(getattr(feddra_ds, name)) for name in ("train", "load_pretrained"))


def test_a_bad_config_raises_all_problems_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    config = tree(root, tmp_path / "run", data__batch_size=0, dro__apply="weights")
    log = list(logger.handlers), logger.level, logger.propagate
    with pytest.raises(ConfigError) as raised:
        feddra_ds.train(config, {"run": {"sed": 1}})
    keys = [problem.split(":")[0] for problem in raised.value.problems]
    assert sorted(keys) == ["data.batch_size", "dro.apply", "run.sed"]
    with pytest.raises(
        ConfigError, match=r"clients\.minimum: 4 is more than the 3 clients"
    ):  # seen with the data alone
        feddra_ds.train(tree(root, tmp_path / "run", clients__minimum=4))
    assert (list(logger.handlers), logger.level, logger.propagate) == log
    assert not (tmp_path / "run").exists()


REPEATED = (
    STATE
    + """
first, second, again = (json.loads(a) for a in sys.argv[1:4])
from feddra_ds.config.load import from_dict
results = [feddra_ds.train(first)]
Path(sys.argv[4]).write_text(json.dumps(second))  # JSON is YAML
results.append(feddra_ds.train(sys.argv[4]))
results.append(feddra_ds.train(from_dict(first), again))
print(json.dumps({
    "changed": unchanged(), "alive": alive(), "threads": [t.name for t in threading.enumerate()],
    "rounds": [[line["round"] for line in r.rounds] for r in results],
    "dirs": [str(r.run_dir) for r in results], "models": [str(r.model_dir) for r in results],
}))
"""
)


@pytest.mark.exhaustive
def test_trainings_in_one_process_equal_those_of_fresh_processes(root: Path, tmp_path: Path) -> None:
    """ZeRO 0, then ZeRO 3, then the first goes on: nothing is left of the one before."""

    def config(name: str, stage: int, rounds: int) -> dict[str, Any]:
        out = tmp_path / name
        return tree(root, out, deepspeed=zero(stage), schedule__rounds=rounds, run__trackers=["tensorboard"], **MORE)

    arguments = [config("zero0", 0, 2), config("zero3", 3, 2), {"schedule": {"rounds": 3}}]
    told = python(REPEATED, *map(json.dumps, arguments), tmp_path / "second.yaml")
    assert told["changed"] == []
    assert told["alive"] == []
    assert told["threads"] == ["MainThread"]
    assert told["rounds"] == [[0, 1], [0, 1], [0, 1, 2]]
    assert told["dirs"] == [str(tmp_path / name) for name in ("zero0", "zero3", "zero0")]
    model, processor = feddra_ds.load_pretrained(told["models"][1])
    assert model.config is not None
    assert processor is not None
    for name, stage, rounds in [("zero3", 3, 2), ("zero0", 0, 3)]:
        fresh = tmp_path / f"fresh-{name}"
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(fresh.name, stage, rounds)))
        command = [sys.executable, "-m", "feddra_ds", "train", "--config", str(tmp_path / "c.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        assert metrics_of(tmp_path / name) == metrics_of(fresh)
        assert same_bits(weights_of(tmp_path / name, rounds - 1), weights_of(fresh, rounds - 1))


INTERRUPTED = (
    STATE
    + """
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background ignores
whole, cut = (json.loads(a) for a in sys.argv[1:3])
feddra_ds.train(whole)
progress = Path(cut["run"]["output_dir"], "progress.json")

def interrupt():
    while True:  # until the second round trains its backbones
        if progress.exists():
            now = json.loads(progress.read_text())
            if (now["round"], now["phase"]) == (1, "stage2"):
                return os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.005)

thread = threading.Thread(target=interrupt)
thread.start()
try:
    feddra_ds.train(cut)
    outcome = "finished"
except KeyboardInterrupt:
    outcome = "interrupted"
thread.join()
told = {"outcome": outcome, "changed": unchanged(), "alive": alive(), "state": json.loads(progress.read_text())["state"]}
result = feddra_ds.train(cut)
print(json.dumps(told | {"rounds": [line["round"] for line in result.rounds], "changed later": unchanged()}))
"""
)


@pytest.mark.slow
def test_ctrl_c_in_a_round_leaves_nothing_and_the_next_call_goes_on(root: Path, tmp_path: Path) -> None:
    shape = {"deepspeed": zero(3), "schedule__rounds": 2, "schedule__stage2_steps": 6, **MORE}
    whole, cut = (tree(root, tmp_path / name, **shape) for name in ("whole", "cut"))
    told = python(INTERRUPTED, json.dumps(whole), json.dumps(cut))
    assert told == {
        "outcome": "interrupted",
        "changed": [],
        "alive": [],
        "state": "stopped",
        "rounds": [0, 1],
        "changed later": [],
    }
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert same_bits(weights_of(tmp_path / "cut", 1), weights_of(tmp_path / "whole", 1))


@pytest.mark.slow
def test_under_the_launcher_every_rank_has_the_result(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree(root, out)))
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, feddra_ds\n"
        f"results = [feddra_ds.train({str(tmp_path / 'c.yaml')!r}, {{'schedule': {{'rounds': n}}}}) for n in (1, 2)]\n"
        f"with open({str(tmp_path)!r} + '/rank-' + os.environ['RANK'], 'w') as file:\n"
        "    json.dump([[r.rounds, str(r.model_dir)] for r in results], file)\n"
    )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), str(script)]
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert [[line["round"] for line in rounds] for rounds, _ in first] == [[0], [0, 1]]
    assert all(len(line["peak_memory_bytes"]) == 2 for rounds, _ in first for line in rounds)
    assert {model for _, model in first} == {str(out / "model")}
