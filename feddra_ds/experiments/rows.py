"""The results file of an experiment: rows.jsonl, one JSON object a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import write_atomic
from feddra_ds.common.parse import OBJECT, parse_json

ROWS_NAME = "rows.jsonl"
Row = dict[str, Any]


class RowsFile:
    """Rows of one experiment, appended by one process. A row that a kill cut off is dropped on opening."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows, whole = _read(path)
            if not whole:
                write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))

    def append(self, row: Row) -> None:
        """Add a row: a line in one write, on disk when this returns."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self.rows.append(row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of the folder that holds it. Raises DataError where there are none."""
    file = path / ROWS_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: there are no rows; `feddra-ds experiment run` writes them")
    return _read(file)[0]


def latest(rows: list[Row]) -> list[Row]:
    """The last row of every run, in the order of the runs' first rows: a run that was tried again counts once."""
    return list({(row["experiment"], row["id"]): row for row in rows}.values())


def _read(path: Path) -> tuple[list[Row], bool]:
    """(rows, whether the file ends with a whole one). Raises DataError for a line in the middle that is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line, OBJECT))
        except ValueError:
            if any(later.strip() for later in lines[number:]):
                raise DataError(f"{path}: line {number} is not JSON; remove it") from None
            return rows, False
    return rows, not lines[-1]
