"""Who says what: on the terminal one readable stream, from rank 0; everything, of each rank, in RUN/logs/rank_K.log.

Of several ranks that fail, the first one's reason is said, once and last: a rank that fails because another one did has
its own in its file alone. RUN/logs/failure.json, which the first one writes, tells them apart on one disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import ConfigError, Interrupted, WaitTimeout, is_told, mark_told
from feddra_ds.common.logs import Printable, logger, say_problems
from feddra_ds.common.parse import OBJECT, parse_json
from feddra_ds.common.text import first_line
from feddra_ds.distributed.launch import Launch

FOLDER = "logs"
_FAILURE = "failure.json"


def path_of(run_dir: Path, rank: int) -> Path:
    """The file of a rank's log."""
    return run_dir / FOLDER / f"rank_{rank}.log"


class _File(logging.FileHandler):
    """Made with its folder at its first line, so that a run that cannot start leaves nothing."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def forget_failure(run_dir: Path) -> None:
    """Before the ranks of a new start meet: that of the last start counts no more. By rank 0, which has the folder's lock."""
    (run_dir / FOLDER / _FAILURE).unlink(missing_ok=True)


@contextmanager
def rank_log(run_dir: Path, launch: Launch) -> Iterator[None]:
    """While in it, this rank's log goes to its file too, and an error that leaves it is said as the module says.

    Of several ranks, what is written below Python (the stacks of torch's C++) goes to the file alone, and of those beside
    rank 0 all that is no line of this package's log.
    """
    path = path_of(run_dir, launch.rank)
    handler = _File(path, encoding="utf-8", delay=True)
    handler.setFormatter(Printable("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with rest_to(path, keep_stderr=launch.rank == 0) if launch.world_size > 1 else nullcontext():
            try:
                yield
            except BaseException as error:
                _say(error, run_dir, launch, handler)
                raise
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def problems_told_once(launch: Launch) -> Iterator[None]:
    """Around what comes before the ranks meet: a ConfigError of several ranks, or of one, is said once, by rank 0, and
    nobody waits for a rank that does not start."""
    try:
        yield
    except ConfigError as error:
        if launch.world_size > 1 and not is_told(error):
            if launch.rank == 0:
                say_problems(error)
            with contextlib.suppress(Interrupted), rest_to(os.devnull, keep_stderr=True):  # torch warns in C++
                from feddra_ds.distributed.meeting import refuse  # late: torch

                if not refuse(launch, error.problems) and launch.rank != 0 and launch.local_rank == 0:
                    say_problems(error)  # rank 0 has gone, or was never there
            mark_told(error)
        raise


@contextmanager
def rest_to(path: str | Path, *, keep_stderr: bool) -> Iterator[None]:
    """What goes to file descriptor 2 and is neither this package's log nor, with keep_stderr, written by Python, goes to a
    file; without it what goes to 1 too."""
    sys.stdout.flush()
    sys.stderr.flush()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    before = sys.stderr
    descriptors = (2,) if keep_stderr else (1, 2)
    kept = [os.dup(number) for number in descriptors]
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    streams = [h for h in logger.handlers if type(h) is logging.StreamHandler and h.stream is before]
    try:
        for number in descriptors:
            os.dup2(file, number)
        for handler in streams:
            handler.setStream(terminal)
        if keep_stderr:
            sys.stderr = terminal
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stderr = before
        for handler in streams:
            handler.setStream(before)
        for number, old in zip(descriptors, kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(file)
        terminal.close()


def _say(error: BaseException, run_dir: Path, launch: Launch, file: logging.Handler) -> None:
    """Write why this rank ends into its file, and on the terminal where it is the first, or rank 0 and another was."""
    if launch.world_size == 1 and isinstance(error, ConfigError):
        return
    words = "".join(traceback.format_exception(error))
    file.handle(logging.LogRecord(logger.name, logging.ERROR, "", 0, "%s", (words,), None))
    if isinstance(error, Interrupted):  # a launcher ends all ranks once one has failed; so does who presses Ctrl-C
        if launch.rank == 0 and _read(run_dir) is None:
            again = f"feddra-ds train --config {run_dir}/config.yaml"
            logger.warning("stopped by a signal; the same command goes on from the last checkpoint, or: %s", again)
        mark_told(error)
    if launch.world_size == 1 or is_told(error):  # alone, it says why where it is caught
        return
    mark_told(error)
    reason = {"rank": launch.rank, "host": socket.gethostname(), "reason": _reason(error)}
    first = _claim(run_dir, reason)
    if first is None:
        _tell(reason, run_dir)
    elif launch.rank == 0 and (_follows(error) or first["reason"] != reason["reason"]):
        _tell(first if _follows(error) else reason, run_dir)


def _reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    is_ours = type(error).__module__.startswith("feddra_ds")
    return first_line(error) if is_ours else f"{type(error).__name__}: {first_line(error)}"


def _follows(error: BaseException) -> bool:
    """Whether an error is what a rank meets where another one has gone."""
    if isinstance(error, WaitTimeout) or type(error).__module__.startswith("torch.distributed"):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL"))


def _tell(reason: dict[str, Any], run_dir: Path) -> None:
    rank = reason["rank"]
    logger.error("rank %s on %s failed: %s (more: %s)", rank, reason["host"], reason["reason"], path_of(run_dir, rank))


def _claim(run_dir: Path, reason: dict[str, Any]) -> dict[str, Any] | None:
    """Note this failure as the first of the run; the one that was first where another was."""
    path = run_dir / FOLDER / _FAILURE
    own = path.with_suffix(f".{reason['rank']}")
    with contextlib.suppress(OSError):  # a full disk: then every rank speaks for itself
        own.write_text(json.dumps(reason), encoding="utf-8")
        try:
            os.link(own, path)  # whole, or not at all
        except FileExistsError:
            return _read(run_dir)
        finally:
            own.unlink()
    return None


def _read(run_dir: Path) -> dict[str, Any] | None:
    try:
        return parse_json((run_dir / FOLDER / _FAILURE).read_bytes(), OBJECT)
    except (OSError, ValueError):
        return None
