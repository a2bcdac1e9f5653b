"""Reads the CSV of `data convert`: every problem with its line, nothing lost silently."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feddra_ds.common.errors import DataError

_MAX_CELL = 10_000_000


@dataclass
class Row:
    """One row: the line it begins at (1 is the header) and the cells of the chosen columns."""

    line: int
    image: str
    text: str
    client: str
    group: str = ""
    site: str = ""
    labels: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A row that was left out, and why."""

    line: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Columns:
    """Names of the columns, by what they are for; None where the user named none."""

    image: str
    text: str
    client: str | None = None
    group: str | None = None
    site: str | None = None
    labels: tuple[str, ...] = ()

    def given(self) -> list[tuple[str, str]]:
        """(option, column) of every column that must be there."""
        named = [("--image-column", self.image), ("--text-column", self.text), ("--client-column", self.client)]
        named += [("--group-column", self.group), ("--site-column", self.site)]
        return [(option, name) for option, name in named if name] + [("--label-columns", name) for name in self.labels]


def read_rows(path: Path, columns: Columns) -> tuple[list[Row], list[Skip]]:
    """Usable rows and those left out: wrong number of cells, no image, no text, no client.

    Raises DataError for a file that cannot be read, is not UTF-8, or lacks a column (all such columns are named).
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header_line = file.readline()
            file.seek(0)
            csv.field_size_limit(_MAX_CELL)
            reader = csv.reader(file, delimiter=max(",;\t", key=header_line.count))
            header = [name.strip() for name in next(reader, [])]
            _check_columns(path, header, columns)
            rows: list[Row] = []
            skipped: list[Skip] = []
            end = reader.line_num
            for cells in reader:
                line, end = end + 1, reader.line_num
                if any(cell.strip() for cell in cells):
                    row = _row(line, header, cells, columns)
                    if isinstance(row, Row):
                        rows.append(row)
                    else:
                        skipped.append(row)
            return rows, skipped
    except OSError as error:
        raise DataError(f"--csv: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--csv: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"--csv: {path}: {error}") from error


def _check_columns(path: Path, header: list[str], columns: Columns) -> None:
    problems = []
    if not any(header):
        raise DataError(f"--csv: {path} is empty; its first line must name the columns")
    repeated = sorted({name for name in header if header.count(name) > 1} & {name for _, name in columns.given()})
    for name in repeated:
        problems.append(f"--csv: {path} has two columns named {name}")
    for option, name in columns.given():
        if name not in header:
            near = nearest(name, header) or "."
            problems.append(f"{option}: {path} has no column {name}{near} Its columns are: {', '.join(header)}")
    if problems:
        raise DataError(problems)


def _row(line: int, header: list[str], cells: list[str], columns: Columns) -> Row | Skip:
    if len(cells) != len(header):
        return Skip(line, "wrong number of cells", f"{len(cells)} instead of {len(header)}")
    cell = dict(zip(header, (c.strip() for c in cells), strict=True))
    row = Row(
        line=line,
        image=cell[columns.image],
        text=cell[columns.text],
        client=cell[columns.client] if columns.client else "all",
        group=cell[columns.group] if columns.group else "",
        labels={name: cell[name] or None for name in columns.labels},
    )
    row.site = cell[columns.site] if columns.site else row.client
    for value, what in ((row.image, "no image"), (row.text, "empty text"), (row.client, "no client")):
        if not value:
            return Skip(line, what)
    return row


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean …?` with the closest of the names, or nothing."""
    lowered = {other.lower(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]}?" if close else ""
