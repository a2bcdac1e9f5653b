"""Writes datasets in the shard contract: aside first, then one rename, so that a dataset is whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import sha256
from feddra_ds.data.format.dataset import DATASET_NAME, FORMAT, IMAGE_SUFFIXES, INDEX_NAME, VERSION
from feddra_ds.data.format.samples import text_id, text_of_json

MAX_SHARD_BYTES = 256 * 1024 * 1024
_HEADER_BYTES = tarfile.BLOCKSIZE  # of a member's header; the data behind it are padded to a multiple of this


def safe_name(value: str) -> str:
    """A client id or sample key as a file name: letters, digits, `_` and `-`; anything else becomes `_`."""
    return re.sub(r"[^\w-]+", "_", value.strip(), flags=re.ASCII).strip("_") or "_"


class DatasetWriter:
    """Context manager: `add` samples, and at a clean exit the dataset appears under `out` in one rename.

    A shard has at most `max_shard_bytes` bytes (a larger sample: a shard of its own) and tar's padding at the end.

    Nothing is left behind when the body raises. The same samples in the same order give the same bytes.

    Raises DataError when `out` exists and is not an empty folder, unless `overwrite`.
    """

    def __init__(self, out: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False):
        self.out = Path(out)
        self.max_shard_bytes = max_shard_bytes
        occupied = self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir()))
        if occupied and not overwrite:
            raise DataError(f"--out: {self.out} exists already; choose another folder, or replace it with --overwrite")
        if occupied and not (self.out / DATASET_NAME).is_file():
            raise DataError(
                f"--out: {self.out} has no {DATASET_NAME}, so it is not a dataset and --overwrite leaves it alone"
            )
        self.aside = self.out.parent / f".{self.out.name}.partial"
        self.info: dict[str, Any] = {}
        self.held_out: list[str] = []
        self._clients: dict[str, _ClientWriter] = {}

    def __enter__(self) -> DatasetWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.aside.exists():
            shutil.rmtree(self.aside)  # left by an earlier run that was killed
        self.aside.mkdir()
        return self

    def add(
        self,
        client: str,
        split: str,
        key: str,
        *,
        image: bytes | None,
        suffix: str = "jpg",
        text: str | None,
        info: dict[str, Any] | None = None,
    ) -> None:
        """Append one sample. A member that is None is left out, which training counts as a bad sample."""
        assert suffix in IMAGE_SUFFIXES, suffix
        assert client == safe_name(client), client
        if client not in self._clients:
            self._clients[client] = _ClientWriter(self.aside / client, self.max_shard_bytes)
        members = {
            suffix: image,
            "txt": None if text is None else text.encode(),
            "json": None if info is None else json.dumps(info, ensure_ascii=False).encode(),
        }
        self._clients[client].add(split, key, {name: data for name, data in members.items() if data is not None})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for client in self._clients.values():
                client.abort()
            shutil.rmtree(self.aside, ignore_errors=True)
            return
        splits = {name: writer.finish() for name, writer in sorted(self._clients.items())}
        info = {"format": FORMAT, "version": VERSION, "clients": sorted(set(splits) - set(self.held_out)),
                "held_out": sorted(self.held_out), "splits": splits, **self.info}  # fmt: skip
        _write_text(self.aside / DATASET_NAME, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
        if self.out.exists():
            replaced = self.out.parent / f".{self.out.name}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.out, replaced)
            os.replace(self.aside, self.out)
            shutil.rmtree(replaced)
        else:
            os.replace(self.aside, self.out)


class _ClientWriter:
    """A client's shards, written by webdataset; then its index, read off them."""

    def __init__(self, folder: Path, max_shard_bytes: int):
        folder.mkdir()
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.keys: set[str] = set()
        self._writers: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}  # of each split's open shard
        self._files: dict[str, BinaryIO] = {}

    def add(self, split: str, key: str, members: dict[str, bytes]) -> None:
        assert key == safe_name(key), key
        assert key not in self.keys, key
        self.keys.add(key)
        if split not in self._writers:
            self._writers[split] = self._start(split)
        size = sum(_HEADER_BYTES + -(-len(data) // _HEADER_BYTES) * _HEADER_BYTES for data in members.values())
        if self._sizes.get(split, 0) and self._sizes[split] + size > self.max_shard_bytes:
            self._writers[split].next_stream()
            self._sizes[split] = 0
        self._sizes[split] = self._sizes.get(split, 0) + size
        self._writers[split].write({"__key__": key, **members})

    def _start(self, split: str) -> Any:
        from webdataset import ShardWriter  # on demand: it imports torch

        fixed = {"mtime": 0, "user": "", "group": ""}  # so that equal samples give equal bytes
        # Webdataset counts bytes without the tar headers, so `add` decides when a shard is full.
        never = {"maxsize": sys.maxsize, "maxcount": sys.maxsize}
        pattern = f"{split}-%06d.tar"
        return ShardWriter(pattern, **never, **fixed, encoder=False, verbose=0, opener=self._open, post=self._close)

    def _open(self, name: str) -> BinaryIO:
        self._files[name] = (self.folder / name).open("wb")
        return self._files[name]

    def _close(self, name: str) -> None:
        with self._files.pop(name) as file:
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> dict[str, int]:
        for writer in self._writers.values():
            writer.close()
        return index_folder(self.folder)

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.close()


def write_index(
    folder: Path, client: str, splits: dict[str, dict[str, list[dict[str, Any]]]], text_field: str | None = None
) -> None:
    """Write a client's index.json, one line per shard and sample. splits: {split: {shards: […], samples: […]}}.

    text_field: the field of a sample's json that is its text where it has no txt."""
    lines = lambda rows: "[\n" + ",\n".join("   " + json.dumps(row) for row in rows) + "\n  ]" if rows else "[]"
    parts = ",\n".join(
        f' {json.dumps(split)}: {{\n  "shards": {lines(part["shards"])},\n  "samples": {lines(part["samples"])}\n }}'
        for split, part in sorted(splits.items())
    )
    head = f'"format": {json.dumps(FORMAT)}, "version": {VERSION}, "client": {json.dumps(client)}'
    head += "" if text_field is None else f', "text_field": {json.dumps(text_field)}'
    _write_text(folder / INDEX_NAME, f'{{{head}, "splits": {{\n{parts}\n}}}}\n')


def index_folder(folder: Path, text_field: str | None = None, notes: list[str] | None = None) -> dict[str, int]:
    """Write index.json for a folder of WebDataset tars made elsewhere; returns {split: samples}.

    A shard's split is its name up to the last `-`. Names are read as webdataset reads them: a sample is a folder with a file
    name up to its first dot. Members of a sample need not be adjacent; the same name again is another sample. Members that
    are not jpg, jpeg, png, txt or json are left out. text_field: the field of a sample's json that is its text where it has
    no txt. notes: gets a line for each thing that was left out or read otherwise than one may think, counted and with an
    example. Raises DataError for a folder without tars, a tar that is compressed or cut off, or one without a sample.
    """
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
    odd: dict[str, list[str]] = {}
    used: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.tar")):
        split = path.stem.rsplit("-", 1)[0]
        part = splits.setdefault(split, {"shards": [], "samples": []})
        try:
            rows, members = _read_shard(path, len(part["shards"]), text_field, odd, used.setdefault(split, set()))
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path}: is not a whole, uncompressed tar: {error}") from error
        if not rows:
            why = next((f"{len(names)} {what}, e.g. {names[0]}" for what, names in odd.items()), "it is empty")
            raise DataError(f"{path}: has no sample among its {members} members ({why}); a sample is NAME.jpg or .png with "
                            "NAME.txt or NAME.json, where NAME has no dot")  # fmt: skip
        part["shards"].append(
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "samples": len(rows)}
        )
        part["samples"] += rows
    if not splits:
        raise DataError(f"{folder}: has no .tar shards")
    if notes is not None:
        notes += [f"{folder}: {len(names)} {what}, e.g. {names[0]}" for what, names in odd.items()]
    write_index(folder, folder.name, splits, text_field)
    return {split: len(part["samples"]) for split, part in sorted(splits.items())}


def _read_shard(
    path: Path, shard: int, text_field: str | None, odd: dict[str, list[str]], used: set[str]
) -> tuple[list[dict[str, Any]], int]:
    """The rows of a shard's samples, and how many files it has. odd gets what is strange by kind, used the keys."""
    rows: list[dict[str, Any]] = []
    latest: dict[str, dict[str, Any]] = {}
    before, members = "", 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            members += 1
            name, suffix = _as_webdataset(member.name)
            if suffix not in (*IMAGE_SUFFIXES, "txt", "json"):
                known = suffix.rpartition(".")[2] in (*IMAGE_SUFFIXES, "txt", "json")
                what = "members with dots in their names" if known and name else "members of other kinds"
                odd.setdefault(f"{what} were left out", []).append(f"{path.name}/{member.name}")
                continue
            row = latest.get(name)
            if row is None or suffix in row:
                if row is not None:
                    odd.setdefault("names come twice, each a sample of its own", []).append(
                        f"{path.name}/{member.name}"
                    )
                row = latest[name] = {"key": _unused(name, used), "shard": shard}
                rows.append(row)
            elif name != before:
                odd.setdefault("members are not beside the others of their sample", []).append(
                    f"{path.name}/{member.name}"
                )
            before = name
            row[suffix] = [member.offset_data, member.size]
            if suffix == "txt" or (suffix == "json" and text_field is not None and "text_id" not in row):
                data = (tar.extractfile(member) or io.BytesIO()).read()
                text = data if suffix == "txt" else text_of_json(data, str(text_field)) or b""
                row["text_id"] = f"{text_id(text.decode(errors='replace')):016x}"
    return rows, members


def _as_webdataset(name: str) -> tuple[str, str]:
    """(sample, suffix in lower case) of a member's name: its folder stays, the file name ends at its first dot."""
    found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.S)
    return (found[1], found[2].lower()) if found else ("", "")


def _unused(key: str, used: set[str]) -> str:
    """The key, with a number behind it where it is used already; it is then used."""
    number, new = 1, key
    while new in used:
        number += 1
        new = f"{key}#{number}"
    used.add(new)
    return new


def index_bare_folders(
    root: Path, text_field: str | None = None, notes: list[str] | None = None
) -> Iterator[tuple[Path, dict[str, int]]]:
    """Write the index of every folder under `root` that has tars but none; (folder, {split: samples}) as each is done.

    text_field, notes: as in `index_folder`.
    """
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and not (folder / INDEX_NAME).exists() and any(folder.glob("*.tar")):
            yield folder, index_folder(folder, text_field, notes)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def image_digest(data: bytes) -> str:
    """A short content hash, for spotting the same picture twice."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
