"""Where each sample lies in a tar, whoever made it: names are read as webdataset reads them."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import sha256
from feddra_ds.common.parse import OBJECT, parse_json
from feddra_ds.common.text import first_line, printable
from feddra_ds.data.format.samples import text_id, texts_of_json
from feddra_ds.data.format.split_by_hash import group_hash

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
KNOWN = (*IMAGE_SUFFIXES, "txt", "json")
_PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def split_of(name: str) -> str:
    """The split that a shard's file, or else the folder it lies in, is named after: `cc3m-validation-0001.tar` is val;
    train where neither says, as `00000.tar`."""
    *_, folder, file = ["", *name.replace("\\", "/").split("/")]
    for part in (file.rpartition(".")[0], folder):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLITS]
        if words:
            return _SPLITS[words[-1]]
    return "train"


def compressed(name: str, file: BinaryIO) -> str | None:
    """What is wrong with a shard that is compressed, whatever its name; None for one that is not. The file is at its start
    afterwards."""
    start = file.read(6)
    file.seek(0)
    packer = next((packer for mark, packer in _PACKERS.items() if start.startswith(mark)), None)
    if packer is None:
        return None
    return f"{name}: is compressed by {packer}, so that no sample can be read without all before it; unpack it to a plain .tar"


@dataclass
class Indexer:
    """The splits of an index, shard by shard.

    text_field: the field of a sample's json that is its text; its txt where the json has none. with_owner: rows also have
    `group`, the hash that val_fraction goes by, and, with client_field, `client`, what that field of the json says.
    """

    text_field: str | None = None
    client_field: str | None = None
    with_owner: bool = False
    splits: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    _odd: dict[str, list[str]] = field(default_factory=dict)
    _used: dict[str, set[str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """A line for each kind of thing that was left out or read otherwise than one may think, counted, with an example."""
        return [f"{len(names)} {what}, e.g. {names[0]}" for what, names in self._odd.items()]

    def add(self, name: str, path: Path, digest: bool = True) -> None:
        """Read the shard at `path`, which the index calls `name`. digest: its sha256 too, for which all of it is read.

        A sample is a folder with a file name up to its first dot. Members of a sample need not be adjacent; the same name
        again is another sample. Raises DataError for a tar that is compressed or cut off, or one without a sample.
        """
        split = split_of(name)
        part = self.splits.setdefault(split, {"shards": [], "samples": []})
        try:
            with path.open("rb") as file:
                problem = compressed(name if "://" in name else str(path), file)
            if problem is not None:
                raise DataError(problem)
            rows, members = self._read(path, len(part["shards"]), self._used.setdefault(split, set()))
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # sizes below 0, names that are no text
            place = name if "://" in name else path
            raise DataError(f"{place}: is not a whole, uncompressed tar: {first_line(error)}") from error
        if not rows:
            why = next((f"{len(names)} {what}, e.g. {names[0]}" for what, names in self._odd.items()), "it is empty")
            raise DataError(f"{path}: has no sample among its {members} members ({why}); a sample is NAME.jpg, .png or .webp "
                            "with NAME.txt or NAME.json, where NAME has no dot")  # fmt: skip
        told: dict[str, Any] = {"file": name, "bytes": path.stat().st_size}
        part["shards"].append(told | ({"sha256": sha256(path)} if digest else {}) | {"samples": len(rows)})
        part["samples"] += rows

    def _read(self, path: Path, shard: int, used: set[str]) -> tuple[list[dict[str, Any]], int]:
        """The rows of a shard's samples, and how many files it has."""
        rows: list[dict[str, Any]] = []
        latest: dict[str, dict[str, Any]] = {}
        before, members = "", 0
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or _is_meta(member.name):
                    continue
                members += 1
                if member.size < 0:
                    raise tarfile.ReadError(f"its member number {members} has a size below 0")
                name, suffix = as_webdataset(member.name)
                place = printable(f"{path.name}/{member.name}")
                if suffix not in KNOWN:
                    dotted = suffix.rpartition(".")[2] in KNOWN and name
                    self._note(
                        f"members {'with dots in their names' if dotted else 'of other kinds'} were left out", place
                    )
                    continue
                row = latest.get(name)
                if row is None or suffix in row:
                    if row is not None:
                        self._note("names come twice, each a sample of its own", place)
                    row = latest[name] = {"key": _unused(name, used), "shard": shard}
                    if self.with_owner:
                        row["group"] = group_hash(name, {})
                    rows.append(row)
                elif name != before:
                    self._note("members are not beside the others of their sample", place)
                before = name
                row[suffix] = [member.offset_data, member.size]
                if suffix == "txt" or (suffix == "json" and (self.text_field or self.with_owner)):
                    source = tar.extractfile(member)
                    assert source is not None
                    self._take(row, name, suffix, source.read())
                tar.members = []  # type: ignore[attr-defined]  # which grow with the shard
            _check_end(path, tar.offset, members)
        return rows, members

    def _take(self, row: dict[str, Any], name: str, suffix: str, data: bytes) -> None:
        """What the row says of a member's content."""
        if suffix == "txt":
            row.setdefault("text_id", f"{text_id(data.decode(errors='replace')):016x}")
            return
        texts = texts_of_json(data, self.text_field) if self.text_field else []
        if texts:
            row["text_id"] = f"{text_id(texts[0]):016x}"
        if self.with_owner:
            info = info_of(data)
            row["group"] = group_hash(name, info)
            if self.client_field is not None and info.get(self.client_field) not in (None, ""):
                row["client"] = str(info[self.client_field])

    def _note(self, what: str, place: str) -> None:
        self._odd.setdefault(what, []).append(place)


def _check_end(path: Path, offset: int, members: int) -> None:
    """Raise OSError where what follows the last member that tarfile found is no end: it stops at a damaged header in silence."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise OSError(f"the header after its member number {members} is damaged")


def info_of(data: bytes) -> dict[str, Any]:
    """A sample's json; {} where it is none, which reading the sample will say."""
    try:
        return parse_json(data, OBJECT)
    except ValueError:
        return {}


def as_webdataset(name: str) -> tuple[str, str]:
    """(sample, suffix in lower case) of a member's name: its folder stays, the file name ends at its first dot."""
    found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.S)
    return (found[1], found[2].lower()) if found else ("", "")


def _is_meta(name: str) -> bool:
    """Whether webdataset takes a member for something about the shard."""
    return re.match(r"__[^/]*__($|/)", name) is not None


def _unused(key: str, used: set[str]) -> str:
    """The key, with a number behind it where it is used already; it is then used."""
    number, new = 1, key
    while new in used:
        number += 1
        new = f"{key}#{number}"
    used.add(new)
    return new
