"""A sheet of an Excel workbook as a source, read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed
from feddra_ds.data.sources.base import Skip, needed
from feddra_ds.data.sources.records import RecordFile, RecordOptions, Records, data_files, words


class ExcelOptions(RecordOptions):
    """Options of a workbook."""

    sheet: str | None = None
    """Name of the sheet; null takes the first."""


class Excel(Records):
    """A workbook (.xlsx, .xlsm) whose first row names the columns; rows are numbered as Excel numbers them."""

    Options = ExcelOptions
    unit = "row"

    def files(self) -> Iterator[RecordFile]:
        """Its files. Raises DataError for one that is no workbook or has no such sheet."""
        openpyxl = needed("openpyxl", "--from excel", "excel")
        for path in data_files(self.path, self.option, (".xlsx", ".xlsm")):
            try:
                book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            except Exception as error:  # openpyxl passes on what zipfile and its XML parser raise
                old = "; save it as .xlsx" if path.suffix.lower() == ".xls" else ""
                raise DataError(f"{self.option}: cannot read {path} as an Excel workbook: {error}{old}") from error
            try:
                name = self.options.sheet or book.sheetnames[0]
                if name not in book.sheetnames:
                    have = listed(book.sheetnames, 20)
                    raise DataError(f"--source-option sheet: {path} has no sheet {name}; there are: {have}")
                sheet = book[name]
                sheet.reset_dimensions()  # what the file says of its size is often wrong
                rows = sheet.iter_rows(values_only=True)
                header = [words(cell) for cell in next(rows, ())]
                while header and not header[-1]:
                    header.pop()
                yield RecordFile(path, header, _records(path.name, header, rows))
            finally:
                book.close()


def _records(file: str, header: list[str], rows: Any) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
    for line, cells in enumerate(rows, 2):
        if all(words(cell) == "" for cell in cells):
            continue
        if any(words(cell) for cell in cells[len(header) :]):
            yield line, Skip(line, "wrong number of cells", f"more than the {len(header)} of the first row", file)
            continue
        yield line, dict(zip(header, cells, strict=False))
