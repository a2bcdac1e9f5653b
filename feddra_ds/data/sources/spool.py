"""Rows kept on disk: a source gives them once, in its order; they are needed again, in another order."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from array import array
from pathlib import Path

from feddra_ds.data.sources.base import Row


class Spool:
    """Rows in a nameless file in `folder`, which disappears with it. Context manager; reads may come from several threads."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115 (closed in __exit__)
        self._starts, self._sizes, self._pictures = array("q"), array("q"), array("q")  # -1: no picture
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, row: Row) -> bytes:
        """Keep a row; returns the bytes that stand for it, without its picture. Call `flush` before reading."""
        fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "picture"}
        data = json.dumps(fields).encode()
        self._starts.append(self._end)
        self._sizes.append(len(data))
        self._pictures.append(-1 if row.picture is None else len(row.picture))
        self._end += self._file.write(data)
        self._end += self._file.write(row.picture or b"")
        return data

    def flush(self) -> None:
        """Make what was appended readable."""
        self._file.flush()

    def __getitem__(self, number: int) -> Row:
        start, size, picture = self._starts[number], self._sizes[number], self._pictures[number]
        row = Row(**json.loads(os.pread(self._file.fileno(), size, start)))
        if picture >= 0:
            row.picture = os.pread(self._file.fileno(), picture, start + size)
        return row
