"""Tables of text (CSV, TSV) beside a folder of images, as a source."""

from __future__ import annotations

import codecs
import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from feddra_ds.common.errors import DataError
from feddra_ds.data.sources.base import Skip
from feddra_ds.data.sources.records import RecordFile, RecordOptions, Records, data_files

_MAX_CELL = 10_000_000
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# what a file that is no table begins with, and the source that reads it
_OTHERS = ((b"PAR1", "Parquet", "parquet"), (b"PK\x03\x04", "an Excel workbook", "excel"))


class TableOptions(RecordOptions):
    """Options of a table."""

    encoding: str | None = None
    """Encoding of the text, such as cp1252 or latin-1; null takes UTF-8, or UTF-16 where the file begins with its mark."""
    delimiter: str | None = None
    """What separates the cells; null takes the most frequent of comma, semicolon and tab in the header line."""


class Table(Records):
    """CSV or TSV with a header line, one file or a folder of them, .gz too; image paths are relative to its folder."""

    Options = TableOptions

    def files(self) -> Iterator[RecordFile]:
        """Its files. Raises DataError for a file that cannot be read or is not in its encoding."""
        for path in data_files(self.path, self.option, (".csv", ".tsv", ".csv.gz", ".tsv.gz")):
            yield read_table(path, self.option, self.options.encoding, self.options.delimiter)


class CsvTable(Table):
    """The table that --csv names."""

    option = "--csv"


def read_table(path: Path, option: str, encoding: str | None = None, delimiter: str | None = None) -> RecordFile:
    """A table as records, a Skip for a row with the wrong number of cells; blank lines are passed over.

    Raises DataError, beginning with `option`, for a file that cannot be read, or is not in its encoding.
    """
    lines = _lines(path, option, encoding, delimiter)
    _, header = next(lines)

    def records() -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        for line, cells in lines:
            if len(cells) != len(header):
                detail = f"{len(cells)} instead of {len(header)}"
                yield line, Skip(line, "wrong number of cells", detail, path.name)
            else:
                yield line, dict(zip(header, cells, strict=True))

    return RecordFile(path, header, records())


def _lines(path: Path, option: str, encoding: str | None, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """(line it begins at, cells) of the header and of every row that is not blank."""
    try:
        name = encoding or _encoding(path, option)
        with _open(path, name) as file:
            header_line = file.readline()
            file.seek(0)
            csv.field_size_limit(_MAX_CELL)
            reader = csv.reader(file, delimiter=delimiter or max(",;\t", key=header_line.count))
            yield 1, [cell.strip() for cell in next(reader, [])]
            end = reader.line_num
            for cells in reader:
                line, end = end + 1, reader.line_num
                if any(cell.strip() for cell in cells):
                    yield line, cells
    except (OSError, EOFError) as error:
        raise DataError(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeError as error:
        where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        readable = "UTF-8" if name == "utf-8-sig" else name
        raise DataError(f"{option}: {path} is not {readable}{where}; save it as UTF-8, or name its encoding, "
                        "as in --source-option encoding=cp1252") from error  # fmt: skip
    except LookupError as error:
        raise DataError(f"--source-option encoding: there is no encoding {encoding}") from error
    except (csv.Error, TypeError) as error:  # a TypeError: a delimiter that is not one character
        raise DataError(f"{option}: {path}: {error}") from error


def _open(path: Path, encoding: str) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _encoding(path: Path, option: str) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        start = file.read(4)
    for mark, what, kind in _OTHERS:
        if start.startswith(mark):
            raise DataError(f"{option}: {path} is {what}; read it with --from {kind} --path {path}")
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8-sig")
