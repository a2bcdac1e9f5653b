"""A user's own objective, strategy and tracker, in a package of theirs: trained on 2 slots x 2 ranks, resumed, exported, shown.

Nothing of feddra_ds is edited. Both keep state that the result depends on, so that a resume that lost it would differ.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import same_bits, tree, weights_of, write_dataset, zero
from spawn import free_port

from feddra_ds.cli import main

REPOSITORY = Path(__file__).parents[2]
OBJECTIVE = '''
"""A hinge on the margin between a pair and the other pairs of its batch."""
from pydantic import Field
from feddra_ds.objectives import Features, Objective, ObjectiveOptions
from feddra_ds.objectives.base import anchor_distance


class MarginOptions(ObjectiveOptions):
    margin: float = Field(0.2, ge=0)
    """By how much a pair must be nearer than what does not belong together."""


class Margin(Objective):
    Options = MarginOptions

    def __call__(self, features, anchors, group):
        whole = features.gathered(group)
        anchor = None
        if anchors is not None:
            anchor = anchor_distance(whole, anchors.gathered(group), self.options.anchor_reduction)
        return self.equation_3(self.per_pair(whole, whole.text_ids), anchor)

    def per_pair(self, features, text_ids):
        similarity = features.image @ features.text.T
        own = similarity.diagonal()
        apart = (text_ids[:, None] != text_ids[None, :]).float()
        rows = (self.options.margin + similarity - own[:, None]).relu() * apart
        columns = (self.options.margin + similarity - own[None, :]).relu() * apart
        return (rows.sum(1) + columns.sum(0)) / apart.sum(1).clamp(min=1)

    def chance(self, batch_size):
        return 2 * self.options.margin
'''
STRATEGY = '''
"""A server with momentum, whose clients are held near the global model by what they drifted so far."""
import torch
from pydantic import Field
from feddra_ds.strategies import Strategy, StrategyOptions


class MomentumOptions(StrategyOptions):
    momentum: float = Field(0.5, ge=0, lt=1)
    """Share of the last server step that the next one repeats."""
    pull: float = Field(1.0, ge=0)
    """How strongly a client is pulled back."""


class Momentum(Strategy):
    Options = MomentumOptions
    presets = {"dro": {"radius": 0.25}}

    def server_step(self, old, mean, state, about):
        velocity = state.setdefault("velocity", [torch.zeros_like(x) for x in old])
        for v, a, b in zip(velocity, old, mean):
            v.mul_(self.options.momentum).add_(b - a)
        return [a + v for a, v in zip(old, velocity)]

    def correct(self, live, start, state, *, learning_rate):
        drift = state.setdefault("drift", [torch.zeros_like(x) for x in live])
        for x, a, d in zip(live, start, drift):
            d.add_(x - a, alpha=0.1)
            x.sub_(self.options.pull * learning_rate * d)
'''
TRACKER = '''
"""A line for each round in a file."""

from accelerate.tracking import GeneralTracker


class Diary(GeneralTracker):
    name = "diary"
    requires_logging_directory = True

    def __init__(self, project, folder):
        super().__init__()
        self.project, self.path = project, f"{folder}/diary.txt"

    @property
    def tracker(self):
        return self.file

    def start(self):
        self.file = open(self.path, "a")

    def store_init_configuration(self, values):
        print(self.project, values["optimizer.lr"], file=self.file)

    def log(self, values, step=None, **kwargs):
        print(step, values["loss/worst"], file=self.file, flush=True)

    def finish(self):
        self.file.close()
'''
OWN = {
    "objective": {"name": "hospital.margin:Margin", "margin": 0.3},
    "strategy": {"name": "hospital.momentum:Momentum", "momentum": 0.7},
    "run": {"trackers": ["hospital.diary:Diary"], "project": "chest"},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "hospital").mkdir()
    for name, text in (("__init__", ""), ("margin", OBJECTIVE), ("momentum", STRATEGY), ("diary", TRACKER)):
        (folder / "hospital" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "three")


def launched(package: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`deepspeed launch/train.py WORDS` on four ranks, with the user's folder on PYTHONPATH."""
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "4"]
    start += ["--master_port", str(free_port()), "launch/train.py"]
    path = os.pathsep.join(p for p in (str(package), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*start, *map(str, words)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400
    )


def config(path: Path, root: Path, out: Path, **changes: object) -> Path:
    values = tree(root, out, **changes)
    for section, keys in OWN.items():
        values[section] = {**values.get(section, {}), **keys}
    path.write_text(yaml.safe_dump(values))
    return path


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trained_resumed_and_exported(package: Path, root: Path, tmp_path: Path) -> None:
    layout = {"topology__ranks_per_slot": 2, "deepspeed": zero(2), "schedule__rounds": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = launched(package, "--config", config(tmp_path / "w.yaml", root, whole, **layout))
    assert done.returncode == 0, done.stdout + done.stderr
    part = config(tmp_path / "c.yaml", root, cut, **layout)
    for rounds in (2, 3):
        done = launched(package, "--config", part, "--schedule.rounds", rounds)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stderr + done.stdout
    assert same_bits(weights_of(whole, 2), weights_of(cut, 2)), "what the hooks keep was lost on the way"
    assert [line["client_losses"] for line in lines(whole)] == [line["client_losses"] for line in lines(cut)]
    told = [f"{line['round']} {line['worst_loss']}" for line in lines(cut)]
    assert (cut / "diary.txt").read_text().splitlines() == ["chest 0.01", *told[:2], "chest 0.01", told[2]]
    saved = {p.relative_to(cut / "checkpoints/round-000002").parts[1:-1] for p in cut.rglob("round-000002/kept/**/*.*")}
    assert saved == {("server", "velocity"), *(("client", c, "drift") for c in ("north", "south", "west"))}

    one = tmp_path / "one"
    told_by(package, "train", "--config", config(tmp_path / "o.yaml", root, one, schedule__rounds=3))
    for a, b in zip(lines(one), lines(whole), strict=True):
        np.testing.assert_allclose(a["client_losses"], b["client_losses"], atol=1e-5)
    plain = tmp_path / "plain"
    path = config(tmp_path / "p.yaml", root, plain, schedule__rounds=3)
    told_by(package, "train", "--config", path, "--strategy.momentum", 0, "--strategy.pull", 0)
    assert abs(lines(plain)[-1]["mean_loss"] - lines(one)[-1]["mean_loss"]) > 1e-4, "the strategy does nothing"

    told_by(package, "export", whole, "--out", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    told_by(package, "report", whole, "--examples", 0)


def told_by(package: Path, *words: object, expect: int = 0) -> tuple[str, str]:
    """`feddra-ds WORDS` in this process, with the user's folder on its path: stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.syspath_prepend(package)
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # --help
            code = int(end.code or 0)
    assert code == expect, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_their_options_are_keys_like_all_others(package: Path, root: Path, tmp_path: Path) -> None:
    path = config(tmp_path / "c.yaml", root, tmp_path / "run")
    wrong = ["--objective.margn", "1", "--objective.margin", "-1", "--strategy.momentum", "2"]
    _, errors = told_by(package, "train", "--config", path, *wrong, expect=2)
    told = [line.removeprefix("feddra-ds: ") for line in errors.strip().splitlines()]
    assert told == [
        "objective.margin: must be greater than or equal to 0 (got -1)",
        "objective.margn: unknown key; did you mean objective.margin?",
        "strategy.momentum: must be less than 1 (got 2)",
    ]
    resolved = yaml.safe_load(told_by(package, "train", "--config", path, "--print_config")[0])
    assert (resolved["objective"]["margin"], resolved["strategy"]["pull"], resolved["dro"]["radius"]) == (
        0.3,
        1.0,
        0.25,
    )
    for words in (("train", "--config", path, "--help"), ("config", "reference", "--config", path)):
        page, _ = told_by(package, *words)
        assert "objective.margin" in page
        assert "By how much a pair must be nearer" in page
        assert "strategy.momentum" in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hospital.margin:Margn", "hospital.margin has no class 'Margn'"),
        ("hospital.nothing:Margin", "No module named 'hospital.nothing'"),
        ("hospital.momentum:Momentum", "must be a subclass of feddra_ds.objectives.base.Objective"),
        ("itta", "did you mean ita?"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_line(
    package: Path, root: Path, tmp_path: Path, name: str, expected: str
) -> None:
    path = config(tmp_path / "c.yaml", root, tmp_path / "run")
    _, errors = told_by(package, "train", "--config", path, "--objective.name", name, expect=2)
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "objective.name" in line]
    assert expected in line
