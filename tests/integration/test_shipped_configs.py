"""Every shipped config, unchanged but for sizes, by the commands that the README names: ZeRO 0 to 3, fp32 and bf16.

What a test sets differently from a shipped default is what it does not test; so nothing else is set here.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_dataset
from spawn import free_port
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from feddra_ds.cli import main
from feddra_ds.config.load import load
from feddra_ds.data.loading.tokens import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))
SIZES = {
    "data.batch_size": 8,
    "data.image_size": 32,
    "data.text_length": 24,
    "dro.evaluation_batch_size": 6,
    "schedule.rounds": 1,
    "schedule.stage1_steps": 1,
    "schedule.stage2_steps": 2,
}
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "three")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small encoders where a config names large ones of a hub."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = load_tokenizer(None)
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **BODY)).save_pretrained(folder / "vision")
    BertModel(BertConfig(vocab_size=len(tokenizer), **BODY)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    text = str(folder / "text")
    return {
        "model.vision.pretrained": str(folder / "vision"),
        "model.text.pretrained": text,
        "model.text.tokenizer": text,
    }


def _options(name: str, root: Path, out: Path, pretrained: dict[str, str], stage: int, bf16: bool) -> list[str]:
    text = (REPOSITORY / "configs" / name).read_text()
    keys: dict[str, object] = {"data.root": root, "run.output_dir": out, **SIZES}
    keys |= pretrained if "pretrained:" in text else {}
    keys |= {"model.text.num_layers": 1} if "num_layers:" in text else {}
    keys |= {"deepspeed.zero_optimization.stage": stage, "deepspeed.bf16.enabled": str(bf16).lower()}
    return [f"configs/{name}", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def _check(out: Path) -> None:
    (line,) = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert line["samples"] == 3 * 3 * 8
    assert not line["excluded_clients"]
    assert all(0 < loss < 20 for loss in line["client_losses"])
    assert (out / "model" / "model.safetensors").is_file()


def _launch(name: str, options: list[str], ranks: int) -> None:
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    # a batchnorm over several ranks of a client needs CUDA: two ranks are then two slots
    one_rank_each = load(name.removesuffix(".yaml")).model.head.batchnorm_key is not None
    layout = ["--topology.ranks_per_slot", "1" if one_rank_each else str(ranks)]
    command = [sys.executable, *launcher, "launch/train.py", "--config", *options, *layout]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


CASES = list(itertools.product(CONFIGS, range(4), (False, True)))


def _is_chosen(name: str, stage: int, bf16: bool) -> bool:
    """Half of the cases: each config at each ZeRO stage in one precision, which alternate."""
    return bf16 == bool((CONFIGS.index(name) // 2 + stage) % 2)


def _tier(ranks: int, name: str, stage: int, bf16: bool) -> pytest.MarkDecorator:
    """CI launches each config once on one rank and once on two, with ZeRO 2 and with ZeRO 3, in fp32 or in bf16."""
    is_launched = stage == 2 + (CONFIGS.index(name) + ranks) % 2 and _is_chosen(name, stage, bf16)
    return pytest.mark.slow if is_launched else pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("ranks", "name", "stage", "bf16"),
    [pytest.param(ranks, *case, marks=_tier(ranks, *case)) for ranks in (1, 2) for case in CASES],
)
def test_by_the_launcher(
    ranks: int, name: str, stage: int, bf16: bool, root: Path, tmp_path: Path, pretrained: dict[str, str]
) -> None:
    _launch(name, _options(name, root, tmp_path / "run", pretrained, stage, bf16), ranks)
    _check(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "stage", "bf16"),
    [pytest.param(*c, marks=pytest.mark.slow if _is_chosen(*c) else pytest.mark.exhaustive) for c in CASES],
)
def test_one_rank_by_the_command(
    name: str,
    stage: int,
    bf16: bool,
    root: Path,
    tmp_path: Path,
    pretrained: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    options = _options(name, root, tmp_path / "run", pretrained, stage, bf16)
    assert main(["train", "--config", *options]) == 0, capsys.readouterr().err
    _check(tmp_path / "run")
