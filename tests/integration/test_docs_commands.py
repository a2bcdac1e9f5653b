"""Every command in README and docs runs: the blocks are taken from the files and run in order on a small data set.

`feddra-ds train` and `deepspeed` get quick settings appended; `make` targets are checked to exist, since `make test` is what
runs this, and the quickstart has a test of its own.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from spawn import free_port

from feddra_ds.cli import main

REPOSITORY = Path(__file__).parents[2]
# what README and data.md make is used by the others
FIRST = [REPOSITORY / "README.md", REPOSITORY / "docs" / "data.md"]
WALKTHROUGH = REPOSITORY / "docs" / "walkthrough.md"  # on data of its own, in a test of its own
DOCUMENTS = [*FIRST, *sorted(set((REPOSITORY / "docs").glob("*.md")) - {*FIRST, WALKTHROUGH})]
CXR = REPOSITORY.parent / "shared" / "data" / "cxr"
QUICK = "--schedule.rounds 1 --schedule.stage1_steps 1 --schedule.stage2_steps 1 --data.image_size 32 --run.trackers []"
# feddra_ds.train with the same settings on top
QUICK_PYTHON = """
import feddra_ds
from feddra_ds.common.tree import merge
from feddra_ds.run.train import train
quick = {"schedule": {"rounds": 1, "stage1_steps": 1, "stage2_steps": 1}, "data": {"image_size": 32}, "run": {"trackers": []}}
feddra_ds.train = lambda config, overrides: train(config, merge(overrides, quick))
"""
NEEDS_A_NETWORK = ("--hostfile", "--no_ssh", "pip install", "mimic_cxr", "https://", "s3://")

pytestmark = pytest.mark.slow


def commands(path: Path, language: str) -> list[str]:
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip() and not line.strip().startswith("#")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the documents expect it: configs/, launch/, metadata.csv with images of three hospitals, scans/ with a
    folder of each, own classes."""
    work = tmp_path_factory.mktemp("work")
    for name in ("configs", "launch", "hostfile.example", "benchmarks", "Makefile"):
        (work / name).symlink_to(REPOSITORY / name)
    (work / "hospital").mkdir()
    text = (REPOSITORY / "docs" / "own_classes.md").read_text()
    for name, code in re.findall(r"^`(hospital/\w+\.py)`:\n\n```python\n(.*?)^```", text, re.M | re.S):
        (work / name).write_text(code)
    (source,) = re.findall(
        r"^```python\n(.*?class Folders.*?)^```", (REPOSITORY / "docs" / "data.md").read_text(), re.M | re.S
    )
    (work / "hospital" / "folders.py").write_text(source)
    (work / "hospital" / "__init__.py").touch()
    (work / "images").mkdir()
    draw = np.random.default_rng(0)
    rows = []
    for number in range(180):
        image = f"images/{number}.png"
        Image.fromarray(draw.integers(0, 255, (48, 48), dtype=np.uint8)).save(work / image)
        hospital = ("north", "south", "west")[number % 3]
        finding = ("opacity", "nodule", "none")[number // 6 % 3]
        scan = work / "scans" / hospital / f"{number}.png"
        scan.parent.mkdir(parents=True, exist_ok=True)
        scan.write_bytes((work / image).read_bytes())
        scan.with_suffix(".txt").write_text(f"finding {number}")
        rows.append((image, f"finding {number} of {draw.integers(1, 99)} mm", hospital, f"p{number // 2}", finding))
    for name, column in (("metadata.csv", "hospital"),):
        with open(work / name, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "text", column, "patient", "finding"))
            writer.writerows(rows)
    return work


def run(command: str, work: Path, quick: str = f"{QUICK} --data.root data/mine") -> tuple[int, str]:
    """A command's exit code and what it said. quick: what a training has on top.

    feddra-ds with plain words needs no shell, and in this process no second import of all packages; what it says, pytest shows.
    """
    if "feddra-ds train" in command or "launch/train.py" in command:
        command += f" {quick}"
    command = re.sub(r"(--num_accelerators|--nproc_per_node) 4", r"\1 2", command)  # ranks that share two cores
    if command.startswith("deepspeed"):
        command = command.replace("deepspeed ", f"deepspeed --master_port {free_port()} ", 1)
    words = shlex.split(command)
    if words[0] == "feddra-ds" and not set(command) & set("|><&;$*~`"):
        with contextlib.chdir(work):
            return main(words[1:]), ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True, timeout=400
    )
    return done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_bash_command_of_the_readme_and_docs(workplace: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    ran: set[str] = set()
    for document in DOCUMENTS:
        for command in commands(document, "bash"):
            if command in ran:
                continue
            if command.startswith("make "):
                assert command.split()[1] in targets, f"{document.name}: {command}"
                continue
            if any(word in command for word in NEEDS_A_NETWORK):
                continue
            code, said = run(command, workplace)
            assert code == 0, f"{document.name}: {command}\n{said}"
            ran.add(command)
    assert len(ran) >= 6, "the README lost its commands, or this test lost them"


@pytest.mark.parametrize("document", ["README.md", "docs/after_training.md"])
def test_the_python_of_the_docs(workplace: Path, document: str) -> None:
    assert (workplace / "runs" / "mine" / "model").is_dir(), "the commands above train it"
    code = "\n".join(commands(REPOSITORY / document, "python"))
    setup = f"from PIL import Image; image = Image.new('L', (64, 64))\n{QUICK_PYTHON}"
    done = subprocess.run(
        [sys.executable, "-c", setup + code + "\nassert similarity.shape[0] == 1"],
        cwd=workplace, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not CXR.is_dir(), reason="the chest radiographs are not beside this checkout")
def test_the_walkthrough(tmp_path: Path) -> None:
    """From a table to a model in transformers, onnxruntime and peft, by what docs/walkthrough.md says and nothing else."""
    for name, target in (("configs", REPOSITORY / "configs"), ("cxr", tmp_path / "table")):
        (tmp_path / name).symlink_to(target)
    small_table(tmp_path / "table")
    ran = commands(WALKTHROUGH, "bash")
    for command in ran:
        code, said = run(command, tmp_path, f"{QUICK} --data.batch_size 8 --dro.evaluation_batch_size 4")
        assert code == 0, f"{command}\n{said}"
    words = {command.split()[1] for command in ran}
    assert words == {"data", "train", "status", "evaluate", "finetune", "export", "report", "embed", "search"}
    told: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec("\n".join(commands(WALKTHROUGH, "python")), told)
        for name in ("image_embeds", "text_embeds"):
            np.testing.assert_allclose(
                told[name], told["output"][name].detach().numpy(), atol=1e-4, err_msg="onnxruntime"
            )
        assert told["similarity"].shape == (1, 2)
        change = (told["moved"] - told["states"]).detach().abs().max()
        assert 0 < float(change) < 1, "the adapter of one step moves the encoder's states a little"
        page = Path("runs/cxr/report.html").read_text()
        for section in (
            "Transfer",
            "Subgroups",
            "Example retrievals",
            "label_group",
            "The worst mixture of the clients",
        ):
            assert section in page
        both = Path("runs/both.html").read_text()
        assert "runs/lora" in both
        assert Path("runs/search.html").read_text().count("<article") == 6
        assert json.loads(Path("runs/cxr/evaluation.json").read_text())["subgroups"]["fields"]["label_group"]


def small_table(folder: Path, most: int = 26) -> None:
    """The first rows of each region, with their pictures."""
    folder.mkdir()
    (folder / "images").symlink_to(CXR / "images")
    with open(CXR / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    regions = {row["region5"] for row in rows}
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for region in sorted(regions):
            writer.writerows([row for row in rows if row["region5"] == region][:most])
