"""Checkpoints beside training: a rank's thread writes the copies that it was given while the next round trains."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from feddra_ds.checkpoint.format import partial_of
from feddra_ds.checkpoint.write import Piece, commit, write
from feddra_ds.common.text import first_line
from feddra_ds.federation.coordinator import Coordinator
from feddra_ds.federation.protocol import Protocol

_INTERRUPTED_S = 10.0  # how long Ctrl-C or SIGTERM waits for the file that is being written


@dataclass(frozen=True)
class Due:
    """A checkpoint to write. pieces: this rank's; ranks: all that write; state: the text of coordinator.json, at rank 0."""

    round_index: int
    folder: Path
    pieces: list[Piece]
    ranks: Sequence[int]
    keep: int  # checkpoint.keep
    state: str | None = None


class CheckpointWriter:
    """One checkpoint at a time, so that the host holds one copy: who begins the next waits for the last one first.

    A context around all rounds: after an error the checkpoint that is being written is finished, after Ctrl-C or a signal it
    is dropped. Rank 0's thread commits when every rank has written.
    """

    def __init__(self, protocol: Protocol, coordinator: Coordinator | None = None):
        self.protocol, self.coordinator = protocol, coordinator
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()
        self._error: BaseException | None = None
        self._seconds: float | None = None

    def begin(self, due: Due) -> None:
        """Write in the background. Call `wait` before."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._work, args=(due,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that was begun is committed, or known to be lost; at another rank, until its part is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take_seconds(self) -> float | None:
        """What the thread took for the checkpoint that it has finished since this was asked last, or None."""
        seconds, self._seconds = self._seconds, None
        return seconds

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        is_interrupt = error is not None and not isinstance(error, Exception)
        if is_interrupt:
            self._dropped.set()
        self._thread.join(_INTERRUPTED_S if is_interrupt else None)
        self._thread = None

    # ---- in the thread
    def _work(self, due: Due) -> None:
        began = time.monotonic()
        try:
            self._write(due)
        except _DroppedError:
            pass
        except BaseException as error:  # for `wait`, in the run's own thread
            self._error = error
        self._seconds = time.monotonic() - began

    def _write(self, due: Due) -> None:
        """This rank's part; at rank 0 the whole."""
        partial = partial_of(due.folder)
        files, problem = {}, None
        try:
            files = write(partial, due.pieces, self._stop_where_dropped)
        except (OSError, SafetensorError) as error:
            problem = first_line(error)
            due.pieces.clear()
        self.protocol.tell_saved(due.round_index, files, problem)
        if self.coordinator is None:
            return
        assert due.state is not None
        files, problems = self.protocol.hear_saved(due.round_index, due.ranks)
        self._stop_where_dropped()
        if not problems:
            try:
                commit(due.folder, due.state, files, due.keep)
            except OSError as error:
                problems = {first_line(error): ["rank 0"]}
        if problems:
            shutil.rmtree(partial, ignore_errors=True)  # which makes room
        self.coordinator.note_checkpoint(due.folder, problems)

    def _stop_where_dropped(self) -> None:
        if self._dropped.is_set():
            raise _DroppedError


class _DroppedError(Exception):
    pass
