"""What all sources of named cells share: tables, JSON lines, Parquet, Excel and `datasets` give records, rows come of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.section import Section
from feddra_ds.common.text import listed
from feddra_ds.data.format.text import is_lfs_file
from feddra_ds.data.sources.base import Row, Skip, Source, nearest

_SPLITS = {"validation": "val", "validate": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}


class RecordOptions(Section):
    """Options of every source of records."""

    images: Path | None = None
    """Folder that image paths are relative to; null takes the folder of the data."""


@dataclass(frozen=True)
class RecordFile:
    """A file of records. columns: their names in order, None where only the records tell. records: (line, cells by name),
    or (line, Skip) for one that cannot be read. split: of all its records, where its place says so."""

    path: Path
    columns: Sequence[str] | None
    records: Iterator[tuple[int, dict[str, Any] | Skip]]
    split: str = ""

    @property
    def name(self) -> str:
        """What its rows call it."""
        return self.path.name


class Records(Source):
    """A source whose rows are cells by column name; image cells are paths, or hold the encoded image."""

    Options = RecordOptions
    needs_columns = True

    @abstractmethod
    def files(self) -> Iterator[RecordFile]:
        """Its files in order. Raises DataError where one cannot be read."""

    def rows(self) -> Iterator[Row | Skip]:
        """A Skip could not be read or has no image, no text or no client.

        Raises DataError where the data cannot be read, or lack a column (all such columns are named).
        """
        for file in self.files():
            if file.columns is not None:
                self._check_columns(file.path, file.columns)
            seen: dict[str, None] = {}
            for line, record in self._read(file):
                if isinstance(record, Skip):
                    yield record
                    continue
                if file.columns is None:
                    seen.update(dict.fromkeys(record))
                yield self._row(file, line, record)
            if file.columns is None:
                self._check_columns(file.path, list(seen))

    def read_image(self, row: Row) -> bytes:
        """The file's bytes. Raises OSError, and ValueError for a path that cannot be one."""
        if row.image.lower().startswith(("http://", "https://")):
            raise ValueError("is an address; fetch the pictures first")
        return (self.folder / row.image).read_bytes()

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to."""
        if self.options.images is not None:
            return Path(self.options.images)
        return self.path if self.path.is_dir() else self.path.parent

    def _read(self, file: RecordFile) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        """Its records; whatever a format's own package raises becomes a DataError that says how far it came."""
        line = 0
        records = iter(file.records)
        while True:
            try:
                line, record = next(records)
            except StopIteration:
                return
            except DataError:
                raise
            except Exception as error:
                raise DataError(
                    f"{self.option}: {file.path} cannot be read after {self.unit} {line}: {error}"
                ) from error
            yield line, record

    def _check_columns(self, path: Path, there: Sequence[str]) -> None:
        problems = []
        given = self.columns.given()
        if not any(there):
            raise DataError(f"{self.option}: {path} is empty; what comes first in it must name the columns")
        repeated = sorted({column for column in there if there.count(column) > 1} & {column for _, column in given})
        for column in repeated:
            problems.append(f"{self.option}: {path} has two columns named {column}")
        for option, column in given:
            if column not in there:
                near = nearest(column, there) or "."
                problems.append(f"{option}: {path} has no column {column}{near} Its columns are: {listed(there, 50)}")
        if problems:
            raise DataError(problems)

    def _row(self, file: RecordFile, line: int, record: dict[str, Any]) -> Row | Skip:
        columns = self.columns
        named = lambda column: words(record.get(column)) if column else ""
        image, picture = _image(record.get(columns.image), f"{Path(file.name).stem}_{line}")
        client = named(columns.client) if columns.client else "all"
        row = Row(
            line=line,
            image=image,
            text=words(record.get(columns.text), " "),
            client=client,
            group=named(columns.group),
            site=named(columns.site) if columns.site else client,
            labels={name: words(record.get(name)) or None for name in columns.labels},
            file=file.name,
            split=split_name(named(columns.split)) if columns.split else file.split,
            picture=picture,
        )
        missing = [(row.image, "no image"), (row.text, "empty text"), (row.client, "no client")]
        if columns.split:
            missing.append((row.split, "no split"))
        for value, what in missing:
            if not value:
                return Skip(line, what, file=file.name)
        return row


def split_name(word: str) -> str:
    """The split that a source's own word stands for: validation, validate, valid and dev are val."""
    return _SPLITS.get(word.strip().lower(), word.strip().lower())


def words(value: Any, between: str = "|") -> str:
    """A cell as text: nothing for None and not-a-number, 3 for 3.0, 1 and 0 for true and false, lists with `between`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple):
        return between.join(text for text in (words(one, between) for one in value) if text)
    return str(value).strip()


def _image(value: Any, name: str) -> tuple[str, bytes | None]:
    """(path or name, encoded image or None) of an image cell; a cell with one image in a list is that image."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        return name, value
    if isinstance(value, dict):  # as Hugging Face stores images
        path = words(value.get("path"))
        return (path or name if value.get("bytes") else path), value.get("bytes")
    return words(value), None


def data_files(path: Path, option: str, endings: Sequence[str]) -> list[Path]:
    """The file itself, or those of a folder and its folders with one of the endings, sorted.

    Raises DataError for none, and for one that is a Git-LFS pointer.
    """
    if path.is_file():
        found = [path]
    elif not path.is_dir():
        raise DataError(f"{option}: cannot read {path}: No such file or directory")
    else:
        found = sorted(p for ending in endings for p in path.rglob(f"*{ending}") if p.is_file())
    if not found:
        raise DataError(f"{option}: {path} has no file that ends in {' or '.join(endings)}")
    for file in found:
        if is_lfs_file(file):
            raise DataError(f"{option}: {file} is a Git-LFS pointer, not the file; git lfs pull fetches it")
    return found
