"""The door for data from elsewhere. A source reads its own format and gives rows; `ingest` makes shards of them.

A source is one file with a subclass of Source, and one row in `feddra_ds.data.sources.SOURCES`.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from feddra_ds.common.errors import DataError
from feddra_ds.common.section import Section


@dataclass
class Row:
    """One image-text pair of a source.

    line: where it stands in its file, different for every row of that file; for a table the line it begins at (1 is the
    header). image: how the source finds the image again, such as its path. client, site: whose pair it is, where it was
    made. group: what must stay on one side of train and val, such as the patient ("" for none). labels: None is not known.
    file: the file of the source that has the row, for messages. split: train, val, test where the source has a split of its
    own, else "". picture: the encoded image where it comes along with the row; else `Source.read_image` is asked for it.
    """

    line: int
    image: str
    text: str
    client: str
    group: str = ""
    site: str = ""
    labels: dict[str, str | None] = field(default_factory=dict)
    file: str = ""
    split: str = ""
    picture: bytes | None = None


@dataclass(frozen=True)
class Skip:
    """A row that was left out, and why. is_choice: the user asked for it, as for a view that is not wanted."""

    line: int
    reason: str
    detail: str = ""
    file: str = ""
    is_choice: bool = False


@dataclass(frozen=True)
class Columns:
    """What the user calls the parts of a row; None where no name was given."""

    image: str
    text: str
    client: str | None = None
    group: str | None = None
    site: str | None = None
    labels: tuple[str, ...] = ()
    split: str | None = None

    def given(self) -> list[tuple[str, str]]:
        """(option, name) of every column that must be there."""
        named = [("--image-column", self.image), ("--text-column", self.text), ("--client-column", self.client)]
        named += [("--group-column", self.group), ("--site-column", self.site), ("--split-column", self.split)]
        return [(option, name) for option, name in named if name] + [("--label-columns", name) for name in self.labels]


class Source(ABC):
    """Rows and images that lie at `path` in some format.

    option: the command-line option that names the path, with which messages about the source begin. Options: its own keys,
    a subclass of Section. needs_columns: the user has to name the columns of image and text. sections: the parts of a
    report that are taken where the user names none; () takes the whole text. unit: what a place in a file is called.
    """

    option: ClassVar[str] = "--path"
    Options: ClassVar[type[Section]] = Section
    needs_columns: ClassVar[bool] = False
    sections: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "line"

    def __init__(self, path: Path, columns: Columns, options: Section | None = None):
        self.path, self.columns = path, columns
        self.options: Any = self.Options() if options is None else options

    @abstractmethod
    def rows(self) -> Iterator[Row | Skip]:
        """Every row in order: a Row where it can be used, else a Skip that says why, so that nothing is lost silently.

        Raises DataError where the source as a whole cannot be read.
        """

    @abstractmethod
    def read_image(self, row: Row) -> bytes:
        """The row's encoded image (JPEG, PNG, BMP, TIFF, WEBP or DICOM). Called from several threads, and only for rows
        without a `picture`.

        Raises OSError or ValueError where it cannot be read; the row is then left out.
        """


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean …?` with the closest of the names, or nothing."""
    lowered = {other.lower(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]}?" if close else ""


def needed(module: str, kind: str, extra: str) -> Any:
    """The module of an optional package. Raises DataError with the extra of this package that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{kind} needs {package}, which is not installed: pip install 'feddra-ds[{extra}]'") from error
