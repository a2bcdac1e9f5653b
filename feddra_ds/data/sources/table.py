"""A table (CSV) beside a folder of images, as a source."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from feddra_ds.common.errors import DataError
from feddra_ds.data.sources.base import Columns, Row, Skip, Source, nearest

_MAX_CELL = 10_000_000


class Table(Source):
    """A CSV with a header line, UTF-8, separated by commas, semicolons or tabs; image paths are relative to its folder."""

    option = "--csv"

    def rows(self) -> Iterator[Row | Skip]:
        """A Skip has the wrong number of cells, no image, no text or no client; blank lines are passed over.

        Raises DataError for a file that cannot be read, is not UTF-8, or lacks a column (all such columns are named).
        """
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                header_line = file.readline()
                file.seek(0)
                csv.field_size_limit(_MAX_CELL)
                reader = csv.reader(file, delimiter=max(",;\t", key=header_line.count))
                header = [name.strip() for name in next(reader, [])]
                _check_columns(self.path, header, self.columns)
                end = reader.line_num
                for cells in reader:
                    line, end = end + 1, reader.line_num
                    if any(cell.strip() for cell in cells):
                        yield _row(line, header, cells, self.columns)
        except OSError as error:
            raise DataError(f"--csv: cannot read {self.path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"--csv: {self.path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"--csv: {self.path}: {error}") from error

    def read_image(self, row: Row) -> bytes:
        """The file's bytes. Raises OSError, and ValueError for a path that cannot be one."""
        return (self.path.parent / row.image).read_bytes()


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
