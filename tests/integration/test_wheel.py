"""The wheel as `pip install` gives it to who has no checkout: configs by name, data, training on two ranks, a model."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spawn import free_port

from feddra_ds.common.tree import set_path

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
TINY = {
    "data.batch_size": 8,
    "data.image_size": 32,
    "data.text_length": 24,
    "dro.evaluation_pairs": 6,
    "dro.evaluation_batch_size": 3,
    "schedule.rounds": 1,
    "schedule.stage1_steps": 1,
    "schedule.stage2_steps": 1,
}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds the wheel; all other packages are those of the running one.

    The running environment's folder is only put on the path: its .pth files, such as that of an editable install of
    the checkout, are not followed.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()  # a copy, for the build leaves files beside what it reads
    for name in ("feddra_ds", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(wheel, check=True, timeout=300)
    shutil.rmtree(source)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True, timeout=60).stdout
    Path(packages.strip(), "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (built,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", built]
    subprocess.run(install, check=True, timeout=300, env=environment(python))
    return python


def environment(python: Path) -> dict[str, str]:
    """Without PYTHONPATH, which may name the checkout; the new environment's commands come first."""
    path = f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    changes = {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | changes


@pytest.fixture(scope="module")
def run(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command in a folder that is no checkout, the same for all tests; gives its stdout."""
    work = tmp_path_factory.mktemp("work")

    def call(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=work, env=environment(python), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return call


def test_the_wheel_is_what_is_imported(python: Path, run: Run) -> None:
    where = Path(run("python", "-c", "import feddra_ds; print(feddra_ds.__file__)").strip())
    assert where.is_relative_to(python.parents[1])


def test_all_requirements_are_there(python: Path, run: Run) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "check")


def test_the_shipped_configs_are_in_it(run: Run) -> None:
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert run("feddra-ds", "config", "show", path.stem) == path.read_text()
    assert "quickstart" in run("feddra-ds", "config", "list")
    assert "fedavg-seed0" in run("feddra-ds", "experiment", "run", "heterogeneity", "--dry-run")


def test_data_training_on_two_ranks_and_the_model_in_python(run: Run) -> None:
    run("feddra-ds", "data", "synth", "--out", "data", "--num-pairs", 200, "--image-size", 32)
    keys = {"data.root": "data", "run.output_dir": "run", **TINY}
    options = [f"--{key}={value}" for key, value in keys.items()]
    launcher = ["python", "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", free_port()]
    run(*launcher, "--module", "feddra_ds", "train", "--config", "quickstart", *options)
    lines = run("cat", "run/metrics.jsonl").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0]
    run("feddra-ds", "report", "run")
    script = "import feddra_ds; model, processor = feddra_ds.load_pretrained('run/model'); print(type(model).__name__)"
    assert run("python", "-c", script).strip() == "DualEncoder"
    tree: dict[str, Any] = {}
    for key, value in (keys | {"run.output_dir": "again"}).items():
        set_path(tree, key, value)
    script = f"import feddra_ds; r = feddra_ds.train('quickstart', {tree!r}); print(len(r.rounds), r.model_dir)"
    assert run("python", "-c", script).split() == ["1", "again/model"]
