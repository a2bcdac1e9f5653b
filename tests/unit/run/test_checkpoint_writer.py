"""The thread that writes checkpoints: a kill anywhere leaves the last whole one, and nobody waits for what cannot come."""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from feddra_ds.checkpoint import write as write_module
from feddra_ds.checkpoint.choose import find_newest
from feddra_ds.checkpoint.format import check, folder_of, partial_of
from feddra_ds.checkpoint.load import SavedFragments
from feddra_ds.checkpoint.write import Piece
from feddra_ds.common.errors import WaitTimeout
from feddra_ds.federation.protocol import Protocol
from feddra_ds.run import checkpoint_writer
from feddra_ds.run.checkpoint_writer import CheckpointWriter, Due


class Killed(BaseException):
    pass


class Messages:
    """As a topology's, of rank 0; who has not posted is never heard of."""

    rank, timeout_s = 0, 0.05

    def __init__(self) -> None:
        self.posted: dict[str, Any] = {}

    def post(self, key: str, value: Any) -> None:
        self.posted[key] = json.loads(json.dumps(value))

    def fetch(self, key: str, *, sender: str, timeout_s: float | None = None) -> Any:
        if key not in self.posted:
            raise WaitTimeout(f"{key} from {sender}")
        return self.posted[key]

    def forget(self, key: str) -> None:
        self.posted.pop(key, None)


def writer_of() -> tuple[CheckpointWriter, list[dict[str, list[str]]]]:
    """A coordinator's writer, and what it notes of each checkpoint."""
    noted: list[dict[str, list[str]]] = []
    coordinator: Any = types.SimpleNamespace(note_checkpoint=lambda folder, problems: noted.append(dict(problems)))
    messages: Any = Messages()
    return CheckpointWriter(Protocol(messages), coordinator), noted


def due(run_dir: Path, number: int, ranks: tuple[int, ...] = (0,), keep: int = 0) -> Due:
    told = {"shapes": json.dumps({"w": [4]}), "starts": json.dumps({"w": 0})}
    pieces = [
        Piece("weights/global/shard-00000-of-00001.safetensors", {"w": torch.full((4,), float(number))}, told),
        Piece("weights/global/buffers.safetensors", {"b": torch.zeros(2)}),
    ]
    return Due(number, folder_of(run_dir, number), pieces, ranks, keep, json.dumps({"round": number, "config": {}}))


def weights(folder: Path) -> list[float]:
    return SavedFragments(folder, "weights/global").parameter("w").tolist()


def dies(function: Callable[..., Any], at: int, leaves: Callable[[Any], None] = lambda place: None) -> Any:
    """As the function, but call number `at` is a kill; leaves: what it has written by then, given its second argument."""
    calls = iter(range(100))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            leaves(args[1] if len(args) > 1 else None)
            raise Killed
        return function(*args, **kwargs)

    return call


half_a_file = lambda path: Path(path).write_bytes(b"\x10")
POINTS = {  # the module and the name of what is called then, and which call of it
    "before a file": (write_module, "save_file", 0),
    "within a file": (write_module, "save_file", 1, half_a_file),
    "before a file is on the disk": (write_module, "described", 0),
    "when all files are written": (Protocol, "tell_saved", 0),
    "when that was told": (Protocol, "hear_saved", 0),
    "when all ranks have written": (checkpoint_writer, "commit", 0),
    "before coordinator.json": (write_module, "write_atomic", 0),
    "before the manifest": (write_module, "write_atomic", 1),
    "before the rename": (write_module.os, "replace", 2),
    "after the rename": (write_module.os, "open", 0),
    "while old ones go": (write_module.shutil, "rmtree", 0),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, at, *leaves = POINTS[point]
    writer, _ = writer_of()
    for number in (0, 1):
        writer.begin(due(tmp_path, number))
        writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies(getattr(module, name), at, *leaves))
        writer.begin(due(tmp_path, 2, keep=2))
        with pytest.raises(Killed):
            writer.wait()
    last = 2 if point in ("after the rename", "while old ones go") else 1
    assert find_newest(tmp_path) == folder_of(tmp_path, last)
    assert weights(folder_of(tmp_path, last)) == [last] * 4
    again, noted = writer_of()
    again.begin(due(tmp_path, 2, keep=2))
    again.wait()
    assert noted == [{}]
    assert check(folder_of(tmp_path, 2)) is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["round-000001", "round-000002"]


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, save_file = threading.Event(), write_module.save_file
    monkeypatch.setattr(write_module, "save_file", lambda *args, **more: go_on.wait(30) and save_file(*args, **more))
    writer, noted = writer_of()
    writer.begin(due(tmp_path, 0))
    assert (noted, writer.take_seconds(), find_newest(tmp_path)) == ([], None, None)
    go_on.set()
    writer.wait()
    assert noted == [{}]
    assert (writer.take_seconds() or 0) > 0
    assert writer.take_seconds() is None


@pytest.mark.parametrize(("error", "is_finished"), [(RuntimeError, True), (KeyboardInterrupt, False)])
def test_an_error_finishes_what_is_being_written_and_ctrl_c_does_not(
    error: type[BaseException], is_finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, save_file = threading.Event(), write_module.save_file

    def slow(*args: Any, **more: Any) -> None:
        began.set()
        threading.Event().wait(0.05)
        save_file(*args, **more)

    monkeypatch.setattr(write_module, "save_file", slow)
    writer, noted = writer_of()

    def run() -> None:
        with writer:
            writer.begin(due(tmp_path, 0))
            assert began.wait(30)
            raise error

    with pytest.raises(error):
        run()
    assert (find_newest(tmp_path) is not None) == is_finished
    assert noted == ([{}] if is_finished else [])


def test_what_is_not_written_is_said_by_rank_and_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, noted = writer_of()
    writer.begin(due(tmp_path, 0, ranks=(0, 1, 2)))  # the others never tell
    writer.wait()

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "save_file", full)
    writer.begin(due(tmp_path, 0))
    writer.wait()
    assert noted == [
        {"not heard of within clients.timeout_s = 0.05 s": ["rank 1", "rank 2"]},
        {"[Errno 28] No space left on device": ["rank 0"]},
    ]
    assert not partial_of(folder_of(tmp_path, 0)).exists()


def test_a_defect_in_the_thread_is_raised_where_the_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _ = writer_of()
    monkeypatch.setattr(write_module, "save_file", lambda *args, **more: 1 / 0)
    writer.begin(due(tmp_path, 0))
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
