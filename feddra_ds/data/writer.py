"""Writes datasets in the shard contract: aside first, then one rename, so that a dataset is whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from feddra_ds.data.shards import (
    DATASET_NAME,
    FORMAT,
    IMAGE_SUFFIXES,
    INDEX_NAME,
    VERSION,
    DataError,
    sha256_of,
    text_id,
)

MAX_SHARD_BYTES = 256 * 1024 * 1024


def safe_name(value: str) -> str:
    """A client id or sample key as a file name: letters, digits, `_` and `-`; anything else becomes `_`."""
    return re.sub(r"[^\w-]+", "_", value.strip(), flags=re.ASCII).strip("_") or "_"


class DatasetWriter:
    """Context manager: `add` samples, and at a clean exit the dataset appears under `out` in one rename.

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
            shutil.rmtree(self.aside)  # of an earlier run that was killed
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
            self._clients[client] = _ClientWriter(self.aside / client, client, self.max_shard_bytes)
        members = [(suffix, image), ("txt", None if text is None else text.encode())]
        members.append(("json", None if info is None else json.dumps(info, ensure_ascii=False).encode()))
        self._clients[client].add(split, key, [(name, data) for name, data in members if data is not None], text)

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
    def __init__(self, folder: Path, client: str, max_shard_bytes: int):
        folder.mkdir()
        self.folder, self.client, self.max_shard_bytes = folder, client, max_shard_bytes
        self.splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.keys: set[str] = set()
        self.open: dict[str, BinaryIO] = {}

    def add(self, split: str, key: str, members: list[tuple[str, bytes]], text: str | None) -> None:
        assert key == safe_name(key), key
        assert key not in self.keys, key
        self.keys.add(key)
        part = self.splits.setdefault(split, {"shards": [], "samples": []})
        file = self.open.get(split)
        if file is not None and file.tell() + sum(len(data) + 1024 for _, data in members) > self.max_shard_bytes:
            self._close(split)
            file = None
        if file is None:
            name = f"{split}-{len(part['shards']):06d}.tar"
            part["shards"].append({"file": name, "bytes": 0, "sha256": "", "samples": 0})
            file = self.open[split] = (self.folder / name).open("wb")
        row: dict[str, Any] = {"key": key, "shard": len(part["shards"]) - 1}
        for suffix, data in members:
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(data)  # mtime, owner and mode stay at their fixed defaults: equal bytes every time
            file.write(header.tobuf(tarfile.USTAR_FORMAT))
            row[suffix] = [file.tell(), len(data)]
            file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        if text is not None:
            row["text_id"] = f"{text_id(text):016x}"
        part["shards"][-1]["samples"] += 1
        part["samples"].append(row)

    def _close(self, split: str) -> None:
        with self.open.pop(split) as file:
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        shard = self.splits[split]["shards"][-1]
        path = self.folder / shard["file"]
        shard["bytes"], shard["sha256"] = path.stat().st_size, sha256_of(path)

    def finish(self) -> dict[str, int]:
        for split in list(self.open):
            self._close(split)
        write_index(self.folder, self.client, self.splits)
        return {split: len(part["samples"]) for split, part in sorted(self.splits.items())}

    def abort(self) -> None:
        for file in self.open.values():
            file.close()


def write_index(folder: Path, client: str, splits: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write a client's index.json, one line per shard and sample. splits: {split: {shards: […], samples: […]}}."""
    lines = lambda rows: "[\n" + ",\n".join("   " + json.dumps(row) for row in rows) + "\n  ]" if rows else "[]"
    parts = ",\n".join(
        f' {json.dumps(split)}: {{\n  "shards": {lines(part["shards"])},\n  "samples": {lines(part["samples"])}\n }}'
        for split, part in sorted(splits.items())
    )
    head = f'"format": {json.dumps(FORMAT)}, "version": {VERSION}, "client": {json.dumps(client)}'
    _write_text(folder / INDEX_NAME, f'{{{head}, "splits": {{\n{parts}\n}}}}\n')


def index_folder(folder: Path) -> dict[str, int]:
    """Write index.json for a folder of WebDataset tars made elsewhere; returns {split: samples}.

    A shard's split is its name up to the last `-`. Members that are not jpg, jpeg, png, txt or json are left out.
    Raises DataError for a folder without tars, and for a tar that is compressed or cut off.
    """
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.tar")):
        part = splits.setdefault(path.stem.rsplit("-", 1)[0], {"shards": [], "samples": []})
        rows: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    suffix = suffix.lower()
                    if not member.isfile() or suffix not in (*IMAGE_SUFFIXES, "txt", "json"):
                        continue
                    row = rows.setdefault(key, {"key": key, "shard": len(part["shards"])})
                    row[suffix] = [member.offset_data, member.size]
                    if suffix == "txt":
                        text = tar.extractfile(member)
                        row["text_id"] = f"{text_id((text or io.BytesIO()).read().decode(errors='replace')):016x}"
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path}: is not a whole, uncompressed tar: {error}") from error
        part["shards"].append(
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "samples": len(rows)}
        )
        part["samples"] += rows.values()
    if not splits:
        raise DataError(f"{folder}: has no .tar shards")
    write_index(folder, folder.name, splits)
    return {split: len(part["samples"]) for split, part in sorted(splits.items())}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def image_digest(data: bytes) -> str:
    """A short content hash, for spotting the same picture twice."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
