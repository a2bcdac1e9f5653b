"""A run's folder belongs to one run at a time: rank 0 holds RUN/.lock from its start to its end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feddra_ds.common.errors import ConfigError
from feddra_ds.common.logs import logger
from feddra_ds.common.parse import OBJECT, parse_json

FILE_NAME = ".lock"
_SIGN_EVERY_S = 10.0
_WATCH_S = 35.0  # who gives no sign on another host for so long is dead


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """While in it, no other process can train in run_dir, which is made if it is not there.

    The kernel gives the lock back when the process ends, however it ends. On a disk where another host's locks are not
    seen, the file itself says who is there, and its owner renews it: a new one watches it for 35 s, and takes it over if
    nothing moves.

    Raises ConfigError, naming host and process, where another run is there.
    """
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / FILE_NAME
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    file, ended = _take(path), threading.Event()
    _sign(file, began)
    renewal = threading.Thread(target=_renew, args=(file, began, ended), name="lock of the run's folder", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)
        if is_new:
            with contextlib.suppress(OSError):  # where the run has left something
                run_dir.rmdir()


def _take(path: Path) -> int:
    """The locked file, open. Raises ConfigError."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = _read(path)
            os.close(file)
            raise _refusal(path, said) from None
        except OSError as error:  # a disk without locks
            logger.debug("%s cannot be locked by the kernel: %s", path, error)
        try:
            if os.fstat(file).st_ino == path.stat().st_ino:  # else its last owner has deleted it in the meantime
                break
        except FileNotFoundError:
            pass
        os.close(file)
    said = _read(path)
    if said and said.get("host") != socket.gethostname() and _gives_signs(path):
        os.close(file)
        raise _refusal(path, said)
    return file


def _refusal(path: Path, said: dict[str, object]) -> ConfigError:
    who = "another process trains there"
    if said:
        who = f"process {said.get('pid')} on {said.get('host')} has trained there since {said.get('began')}"
    return ConfigError(
        [f"run.output_dir: {path.parent} is in use: {who}; wait for it, end it, or choose another folder"]
    )


def _gives_signs(path: Path) -> bool:
    """Whether the owner on another host renews the file."""
    before, until = path.read_text(encoding="utf-8"), time.monotonic() + _WATCH_S
    logger.info("%s was left by another host; watching for %.0f s whether that run still lives", path, _WATCH_S)
    while time.monotonic() < until:
        if not path.exists():
            return False
        if path.read_text(encoding="utf-8") != before:
            return True
        time.sleep(_SIGN_EVERY_S / 10)
    return False


def _sign(file: int, began: str) -> None:
    said = {"host": socket.gethostname(), "pid": os.getpid(), "began": began, "sign": time.time()}
    os.pwrite(file, json.dumps(said).ljust(400).encode(), 0)  # of one length, so that no reader sees a mixture's end


def _renew(file: int, began: str, ended: threading.Event) -> None:
    while not ended.wait(_SIGN_EVERY_S):
        with contextlib.suppress(OSError):
            _sign(file, began)


def _read(path: Path) -> dict[str, object]:
    """What the owner says of itself; {} where nothing can be read."""
    try:
        return parse_json(path.read_bytes(), OBJECT)
    except (OSError, ValueError):
        return {}
