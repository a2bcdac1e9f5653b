"""What a launch of several ranks leaves on the terminal: a mistake in the config once, a failure's reason last."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from helpers import tree, write_dataset
from spawn import run_ranks


def train(rank: int, world_size: int, config: Path, terminal: Path, words: list[str], broken: int | None) -> int:
    """`feddra-ds train` of this rank on a terminal that all share; its exit code. broken: a rank that raises in a step."""
    from feddra_ds.cli import main
    from feddra_ds.federation.step import LocalStep

    shared = os.open(terminal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(shared, number)

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a step of mine")

    with patch.object(LocalStep, "__call__", fail if rank == broken else LocalStep.__call__):
        return main(["train", "--config", str(config), *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d", {"north": 16})


def launch(data: Path, folder: Path, num: int, *words: str, broken: int | None = None) -> tuple[list[int], list[str]]:
    """(exit codes, the terminal's lines) of so many ranks in one slot."""
    config = folder / "c.yaml"
    shape = {"topology__ranks_per_slot": num, "clients__timeout_s": 60.0}
    config.write_text(yaml.safe_dump(tree(data, folder / "run", **shape)))
    codes = run_ranks(train, num, config, folder / "terminal", list(words), broken, init_group=False, timeout=240)
    return codes, (folder / "terminal").read_text().splitlines()


def test_a_bad_key_is_said_once_by_four_ranks(data: Path, tmp_path: Path) -> None:
    codes, lines = launch(data, tmp_path, 4, "--schedule.round", "1")
    assert codes == [2] * 4
    (line,) = lines
    assert "schedule.round: " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_last_line_names_the_rank_that_failed_and_why(data: Path, tmp_path: Path) -> None:
    codes, lines = launch(data, tmp_path, 2, broken=1)
    assert codes == [1, 1]
    assert "rank 1 on " in lines[-1]
    assert "failed: ZeroDivisionError: a step of mine (more: " in lines[-1]
    assert not [line for line in lines if "Traceback" in line or "gloo" in line], lines
    logs = {rank: (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)}
    assert "in fail" in logs[1], "its traceback is in its file"
    assert "Traceback" in logs[0]
    assert "slot rank" in logs[0]
