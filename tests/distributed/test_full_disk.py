"""A checkpoint that cannot be written: the kernel refuses files above a size, on one rank of two, as a full disk would."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import build_run, finish, metrics_of, on_ranks, tree, zero

SETTINGS: dict[str, Any] = {"deepspeed": zero(2), "topology__ranks_per_slot": 2, "evaluation__every": 0}


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def with_full_disk(config_tree: dict[str, Any], rounds: list[int]) -> str | None:
    """All rounds, in some of which rank 1 cannot save; what the run ended with."""
    from feddra_ds.common.errors import CheckpointNotWritten, TooFewClients

    run = build_run(config_tree)
    save = run.save

    def on_full_disk(round_index: int, record: Any) -> None:
        full = run.topology.rank == 1 and round_index in rounds
        with no_file_above(1000) if full else contextlib.nullcontext():
            save(round_index, record)
            run.checkpoints.wait()  # the limit is the process's, and the thread writes beside the next round

    run.save = on_full_disk
    said = None
    try:
        run.rounds()
    except TooFewClients as error:
        return str(error)
    except CheckpointNotWritten as error:
        said = str(error)
    finish(run)
    return said


def asked_to_stop_on_a_full_disk(config_tree: dict[str, Any]) -> str | None:
    """A run that SIGUSR1 ends after its first round, whose checkpoint rank 1 cannot write; what it says of it."""
    from feddra_ds.common.errors import CheckpointNotWritten
    from feddra_ds.run import stop_request

    run = build_run(config_tree)
    with stop_request.heard_by_signal(), no_file_above(1000) if run.topology.rank == 1 else contextlib.nullcontext():
        signal.raise_signal(signal.SIGUSR1)
        try:
            run.rounds()
            said = run.progress.stopped
        except CheckpointNotWritten as error:
            said = str(error)
    finish(run)
    return said


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_run_goes_on_and_keeps_what_is_whole(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, schedule__rounds=3, **SETTINGS)
    assert on_ranks(with_full_disk, 2, config, [1]) == [None, None]
    assert checkpoints(tmp_path) == ["round-000000", "round-000002"]
    assert len(metrics_of(tmp_path)) == 3
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_last_round_needs_its_checkpoint(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, schedule__rounds=2, **SETTINGS)
    told, _ = on_ranks(with_full_disk, 2, config, [1])
    assert told is not None
    assert "rank 1: " in told
    assert "make room, and the same command" in told
    assert checkpoints(tmp_path) == ["round-000000"]
    assert on_ranks(with_full_disk, 2, config, []) == [None, None]
    assert checkpoints(tmp_path) == ["round-000000", "round-000001"]


@pytest.mark.parametrize(
    ("on_error", "wanted"),
    [
        ("continue", "asked to by SIGUSR1, but no checkpoint"),
        pytest.param("stop", "it was asked to stop: make room", marks=pytest.mark.slow),
    ],
)
def test_an_early_end_says_that_its_checkpoint_is_lost(
    on_error: str, wanted: str, dataset: Path, tmp_path: Path
) -> None:
    config = tree(dataset, tmp_path, schedule__rounds=3, checkpoint__on_error=on_error, **SETTINGS)
    for said in on_ranks(asked_to_stop_on_a_full_disk, 2, config):
        assert said is not None
        assert wanted in said
        assert "(rank 1: " in said
    assert checkpoints(tmp_path) == []
    assert len(metrics_of(tmp_path)) == 1


def test_or_the_run_stops(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, schedule__rounds=3, checkpoint__on_error="stop", **SETTINGS)
    for said in on_ranks(with_full_disk, 2, config, [0]):
        assert said is not None
        assert "rank 1" in said
        assert "File too large" in said
        assert "checkpoint.on_error is stop" in said
    assert checkpoints(tmp_path) == []
