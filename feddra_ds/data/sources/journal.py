"""What a conversion has done so far, kept beside its shards, so that the same command goes on where one was cut off."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from feddra_ds.common.errors import DataError
from feddra_ds.common.parse import OBJECT, parse_json
from feddra_ds.data.sources.base import Skip
from feddra_ds.data.sources.dicom import Scaled

Stream = tuple[str, str]  # a client's folder and a split: its shards are filled one after the other


@dataclass
class Shard:
    """A shard and what went into it: `items` rows, of which `skipped` were left out. scaled: as in `Ingested`."""

    client: str
    split: str
    file: str = ""
    bytes: Annotated[int, Field(ge=0)] = 0
    items: Annotated[int, Field(ge=0)] = 0
    skipped: list[Skip] = field(default_factory=list)
    scaled: list[tuple[Scaled, str]] = field(default_factory=list)


class _Facts(TypedDict):
    facts: dict[str, Any]


_Picture = tuple[int, str | Skip]  # a row and what was found of its picture
_LINE: TypeAdapter[_Facts | _Picture | Shard] = TypeAdapter(_Facts | _Picture | Shard)


class Journal:
    """Context manager; one process at a time. A line of its file is {facts}, [row, picture] or {shard}.

    folder: where the shards are made. facts: by option, all that their bytes depend on. pictures: by row, what an earlier
    process found of its picture: its digest, or a Skip. shards: those that an earlier process has finished.

    Raises DataError where another process converts into the folder, where the facts were others when it was cut off, and
    where a finished shard is not what it was. What is there stays as it is then.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], restart: bool = False):
        self.folder, self.restart = folder, restart
        self.facts = parse_json(json.dumps(facts), OBJECT)
        self.path = folder.with_name(f"{folder.name}.jsonl")
        self.pictures: dict[int, str | Skip] = {}
        self.shards: list[Shard] = []
        self._open: dict[Stream, Shard] = {}
        self._has_shards = False
        self._file: BinaryIO

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = [] if self.restart or not self.folder.is_dir() else self._lines()
            if lines and isinstance(lines[0], dict):
                self._go_on(lines[0], lines[1:])
            else:
                self._begin()
        except BlockingIOError:
            self._file.close()
            raise DataError(f"--out: another conversion is at work in {self.folder}; wait until it has ended") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._file.truncate(0)
        self._write({"facts": self.facts})
        self._file.flush()

    def _lines(self) -> list[_Facts | _Picture | Shard]:
        """The lines of an earlier process; one that was cut off, or is none, is dropped with what comes after it."""
        self._file.seek(0)
        lines: list[_Facts | _Picture | Shard] = []
        end = 0
        for line in self._file:
            try:
                lines.append(parse_json(line, _LINE))
            except ValueError:
                break
            end += len(line)
        self._file.truncate(end)
        return lines

    def _go_on(self, facts: _Facts, lines: list[_Facts | _Picture | Shard]) -> None:
        self._compare(facts["facts"])
        for line in lines:
            if isinstance(line, Shard):
                self.shards.append(line)
            elif isinstance(line, tuple):
                row, found = line
                self.pictures[row] = found
        self._has_shards = bool(self.shards)
        finished = {self.folder / shard.client / shard.file: shard.bytes for shard in self.shards}
        for path, size in finished.items():
            if not os.path.isfile(path) or path.stat().st_size != size:  # no error for a name that is too long
                raise DataError(f"--out: {path} is not the shard that was finished before the conversion was cut off; "
                                "--restart begins anew")  # fmt: skip
        for path in self.folder.glob("*/*.tar"):
            if path not in finished:
                path.unlink()

    def _compare(self, before: dict[str, Any]) -> None:
        problems = []
        for option in {**before, **self.facts}:
            was, now = before.get(option), self.facts.get(option)
            if was == now:
                continue
            how = f"was {_said(was)} and is {_said(now)}"
            if option.startswith("rows of "):
                how = "have changed"
            problems.append(
                f"{option}: {how} since the conversion into {self.folder} was cut off; --restart begins anew"
            )
        if problems:
            raise DataError(problems)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self.keeps(error):
            self.path.unlink()
        self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")

    def found(self, row: int, picture: str | Skip) -> None:
        """Keep what was found of a row's picture, in the rows' order."""
        if row not in self.pictures:
            self._write([row, asdict(picture) if isinstance(picture, Skip) else picture])

    def take(self, client: str, split: str, skip: Skip | None = None, scaled: tuple[Scaled, str] | None = None) -> None:
        """A row was added to its open shard, or left out."""
        shard = self._open.setdefault((client, split), Shard(client, split))
        shard.items += 1
        shard.skipped += [] if skip is None else [skip]
        shard.scaled += [] if scaled is None else [scaled]

    def left(self, order: Iterable[tuple[int, str]], client_of: Callable[[int], str]) -> list[tuple[int, str]]:
        """Of (row, split) in the order of writing, those that the finished shards have not taken."""
        taken: Counter[Stream] = Counter()
        for shard in self.shards:
            taken[shard.client, shard.split] += shard.items
        if not taken:
            return list(order)
        out = []
        for row, split in order:
            stream = client_of(row), split
            if taken[stream]:
                taken[stream] -= 1
            else:
                out.append((row, split))
        return out

    @property
    def num_shards(self) -> dict[Stream, int]:
        """How many shards are finished, by client and split: for the writer."""
        return dict(Counter((shard.client, shard.split) for shard in self.shards))

    def finish(self, client: str, split: str, path: Path) -> None:
        """The open shard is whole and on the disk: for the writer."""
        shard = self._open.pop((client, split))
        shard.file, shard.bytes = path.name, path.stat().st_size
        self._write(asdict(shard))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._has_shards = True

    def keeps(self, error: BaseException) -> bool:
        """Whether what is there stays after an error: always, unless the error is the data's and no shard was finished."""
        return self._has_shards or not isinstance(error, DataError)


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)
