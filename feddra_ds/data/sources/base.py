"""The door for data from elsewhere. A source reads its own format and gives rows; `ingest` makes shards of them.

A source is one file with a subclass of Source, and one row in `feddra_ds.data.sources.SOURCES`.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from feddra_ds.common.section import Section


@dataclass
class Row:
    """One image-text pair of a source.

    line: where it stands in the source, different for every row; for a table the line it begins at (1 is the header).
    image: how the source finds the image again, such as its path. client, site: whose pair it is, where it was made.
    group: what must stay on one side of train and val, such as the patient ("" for none). labels: None is not known.
    """

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
    """What the user calls the parts of a row; None where no name was given."""

    image: str
    text: str
    client: str | None = None
    group: str | None = None
    site: str | None = None
    labels: tuple[str, ...] = ()

    def given(self) -> list[tuple[str, str]]:
        """(option, name) of every column that must be there."""
        named = [("--image-column", self.image), ("--text-column", self.text), ("--client-column", self.client)]
        named += [("--group-column", self.group), ("--site-column", self.site)]
        return [(option, name) for option, name in named if name] + [("--label-columns", name) for name in self.labels]


class Source(ABC):
    """Rows and images that lie at `path` in some format.

    option: the command-line option that names the path, with which messages about the source begin. Options: its own keys,
    a subclass of Section.
    """

    option: ClassVar[str] = "--path"
    Options: ClassVar[type[Section]] = Section

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
        """The row's encoded image (JPEG, PNG, BMP, TIFF or WEBP). Called from several threads.

        Raises OSError or ValueError where it cannot be read; the row is then left out.
        """


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean …?` with the closest of the names, or nothing."""
    lowered = {other.lower(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]}?" if close else ""
