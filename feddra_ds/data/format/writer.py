"""Writes datasets in the shard contract: aside first, then one rename, so that a dataset is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import DATASET_NAME, FORMAT, INDEX_NAME, VERSION, safe_name
from feddra_ds.data.format.indexing import IMAGE_SUFFIXES, Indexer

MAX_SHARD_BYTES = 256 * 1024 * 1024
_HEADER_BYTES = tarfile.BLOCKSIZE  # of a member's header; the data behind it are padded to a multiple of this


class Log(Protocol):
    """Remembers what was written, so that another writer of the same samples goes on behind it."""

    @property
    def num_shards(self) -> dict[tuple[str, str], int]:
        """How many shards are finished, by client and split."""

    def finish(self, client: str, split: str, path: Path) -> None:
        """Hear of a shard that is whole and on the disk."""

    def keeps(self, error: BaseException) -> bool:
        """Whether what is there stays after an error."""


class DatasetWriter:
    """Context manager: `add` samples, and at a clean exit the dataset appears under `out` in one rename.

    A shard has at most `max_shard_bytes` bytes (a larger sample: a shard of its own) and tar's padding at the end.
    The same samples in the same order give the same bytes.

    Without a `log` nothing is left behind when the body raises. With one, finished shards stay in `aside`, and `add` is
    called for the samples behind them.

    Raises DataError when `out` exists and is not an empty folder, unless `overwrite`.
    """

    def __init__(self, out: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False):
        self.out = Path(out)
        self.max_shard_bytes = max_shard_bytes
        self.log: Log | None = None
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
        if self.aside.exists() and self.log is None:
            shutil.rmtree(self.aside)  # left by an earlier run that was killed
        self.aside.mkdir(exist_ok=True)
        for client, _ in [] if self.log is None else self.log.num_shards:
            self._client(client)
        return self

    def _client(self, client: str) -> _ClientWriter:
        if client not in self._clients:
            self._clients[client] = _ClientWriter(self.aside / client, self.max_shard_bytes, self.log)
        return self._clients[client]

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
        members = {
            suffix: image,
            "txt": None if text is None else text.encode(),
            "json": None if info is None else json.dumps(info, ensure_ascii=False).encode(),
        }
        self._client(client).add(split, key, {name: data for name, data in members.items() if data is not None})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for writer in self._clients.values():
                writer.abort()
            if self.log is None or error is None or not self.log.keeps(error):
                shutil.rmtree(self.aside, ignore_errors=True)
            return
        for writer in self._clients.values():
            writer.close()
        splits = {name: index_folder(writer.folder) for name, writer in sorted(self._clients.items())}
        info = {"format": FORMAT, "version": VERSION, "clients": sorted(set(splits) - set(self.held_out)),
                "held_out": sorted(self.held_out), "splits": splits, **self.info}  # fmt: skip
        _write_text(self.aside / DATASET_NAME, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
        replaced = self.out.parent / f".{self.out.name}.replaced"
        if self.out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.out, replaced)
        os.replace(self.aside, self.out)
        if replaced.exists():  # perhaps by an earlier run that was killed between the two renames
            shutil.rmtree(replaced)


class _ClientWriter:
    """A client's shards, written by webdataset."""

    def __init__(self, folder: Path, max_shard_bytes: int, log: Log | None):
        folder.mkdir(exist_ok=log is not None)
        self.folder, self.max_shard_bytes, self.log = folder, max_shard_bytes, log
        self._num_shards = {} if log is None else log.num_shards
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
        first = self._num_shards.get((self.folder.name, split), 0)
        more = {"start_shard": first, "opener": self._open, "post": lambda name: self._close(name, split)}
        return ShardWriter(pattern, **never, **fixed, **more, encoder=False, verbose=0)

    def _open(self, name: str) -> BinaryIO:
        self._files[name] = (self.folder / name).open("wb")
        return self._files[name]

    def _close(self, name: str, split: str) -> None:
        with self._files.pop(name) as file:
            file.flush()
            os.fsync(file.fileno())
        if self.log is not None:
            self.log.finish(self.folder.name, split, self.folder / name)

    def close(self) -> None:
        """Finish the open shards."""
        for writer in self._writers.values():
            writer.close()

    def abort(self) -> None:
        """Close the open shards, which are not finished."""
        self.log = None
        self.close()


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

    text_field: the field of a sample's json that is its text. notes: gets a line for each thing that was left out or read
    otherwise than one may think. See `Indexer`. Raises DataError for a folder without tars, a tar that is compressed or cut
    off, or one without a sample.
    """
    indexer = Indexer(text_field)
    for path in sorted(folder.glob("*.tar")):
        indexer.add(path.name, path)
    if not indexer.splits:
        raise DataError(f"{folder}: has no .tar shards")
    if notes is not None:
        notes += [f"{folder}: {note}" for note in indexer.notes]
    write_index(folder, folder.name, indexer.splits, text_field)
    return {split: len(part["samples"]) for split, part in sorted(indexer.splits.items())}


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
