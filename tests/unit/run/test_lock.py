"""A run's folder has one run at a time, whatever became of the last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from feddra_ds.common.errors import ConfigError
from feddra_ds.run import lock
from feddra_ds.run.lock import FILE_NAME, locked

ELSEWHERE = {"host": "elsewhere", "pid": 7, "began": "2026-01-01 00:00:00", "sign": 1.0}


def test_a_second_run_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with locked(folder):
        with pytest.raises(ConfigError) as error, locked(folder):
            pass
        (line,) = error.value.problems
        assert line.startswith(f"run.output_dir: {folder} is in use: process {os.getpid()} on ")
        assert "\n" not in line
        with pytest.raises(ConfigError), locked(folder):  # the refusal has not given the lock back
            pass
    assert not folder.exists(), "a run that wrote nothing leaves no folder"
    folder.mkdir()
    with pytest.raises(RuntimeError), locked(folder):
        raise RuntimeError
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom feddra_ds.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} on"), locked(tmp_path):
        pass
    process.kill()
    process.wait(10)
    assert (tmp_path / FILE_NAME).exists()
    began = time.monotonic()
    with locked(tmp_path):
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5, "nobody watches a file of this host: the kernel knows"


@pytest.mark.parametrize("lives", [True, False])
def test_a_lock_of_another_host_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool) -> None:
    """On a disk where its kernel's lock is not seen, a run on another host is known by its signs."""
    monkeypatch.setattr(lock, "_WATCH_S", 1.0)
    monkeypatch.setattr(lock, "_SIGN_EVERY_S", 0.2)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(ELSEWHERE))
    ended = threading.Event()

    def give_signs() -> None:
        while not ended.wait(0.1):
            path.write_text(json.dumps(ELSEWHERE | {"sign": time.time()}))

    owner = threading.Thread(target=give_signs)
    try:
        if lives:
            owner.start()
            with (
                pytest.raises(ConfigError, match="process 7 on elsewhere has trained there since 2026"),
                locked(tmp_path),
            ):
                pass
        else:
            with locked(tmp_path):
                first = path.read_text()
                time.sleep(0.5)
                assert path.read_text() != first, "the owner gives signs"
    finally:
        ended.set()
        if lives:
            owner.join()


def test_a_damaged_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    with locked(tmp_path):
        pass
