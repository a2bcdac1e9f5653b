"""The shard contract: WebDataset tars plus an index which lists every sample's place in its tar.

    ROOT/dataset.json                        what the whole is: clients, held-out clients, how it was made
    ROOT/<client>/index.json                 each shard's bytes and sha256, each sample's key, offsets and text id
    ROOT/<client>/{train,val,test}-%06d.tar  <key>.{jpg|jpeg|png}, <key>.txt, <key>.json

Samples are read by offset with one `pread` each, so any order costs the same. Only jpg, jpeg, png, txt and json are
ever decoded: there is no pickle, and no member name chooses code.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
INDEX_NAME, DATASET_NAME = "index.json", "dataset.json"
FORMAT, VERSION = "feddra-shards", 1
_MAX_OPEN_SHARDS = 64


class DataError(ValueError):
    """One or more problems of a dataset, each a line that names the config key, file or client."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def text_id(text: str) -> int:
    """A 63-bit hash of the whitespace-normalised text: equal for identical reports, everywhere and for ever."""
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class Samples:
    """Where one client's samples of one split lie. Arrays are (n,); an offset of -1 says that the member is missing."""

    client: str
    split: str
    paths: list[str]
    keys: list[str]
    shard: np.ndarray
    image: np.ndarray
    text: np.ndarray
    info: np.ndarray
    text_ids: np.ndarray
    _files: OrderedDict[int, int] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors belong to one process

    def read_image(self, index: int) -> bytes | None:
        """The encoded image, or None where the sample has none. Raises EOFError when the shard ends too early."""
        return self._read(index, self.image)

    def read_text(self, index: int) -> bytes | None:
        """The text as UTF-8 bytes, or None where the sample has none. Raises EOFError when the shard ends too early."""
        return self._read(index, self.text)

    def read_info(self, index: int) -> dict[str, Any]:
        """The sample's json member ({} where there is none): labels, site, patient, …"""
        raw = self._read(index, self.info)
        return {} if raw is None else json.loads(raw)

    def _read(self, index: int, member: np.ndarray) -> bytes | None:
        offset, length = int(member[index, 0]), int(member[index, 1])
        if offset < 0:
            return None
        data = os.pread(self._descriptor(int(self.shard[index])), length, offset)
        if len(data) != length:
            raise EOFError(f"{self.paths[int(self.shard[index])]} ends before sample {self.keys[index]}")
        return data

    def _descriptor(self, shard: int) -> int:
        # Threads may race here: at worst a shard is opened twice, and close() below never hits a descriptor in use,
        # because each process reads from one thread per Samples.
        found = self._files.get(shard)
        if found is None:
            found = self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if len(self._files) > _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return found

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


class Dataset:
    """A folder of clients. `client_ids` are those to train on, `held_out` those kept for testing transfer."""

    def __init__(self, root: str | Path, ids: Sequence[str] | None = None):
        self.root = Path(root)
        problems, self.info, self.clients = _scan(self.root)
        if problems:
            raise DataError(problems)
        held_out = set(self.info.get("held_out", []))
        self.held_out = [c for c in self.clients if c in held_out]
        self.client_ids = list(ids) if ids is not None else [c for c in self.clients if c not in held_out]
        missing = _missing_clients(self.root, self.client_ids, self.clients)
        if missing:
            raise DataError(missing)
        self._indexes: dict[str, dict[str, Any]] = {}

    def index(self, client: str) -> dict[str, Any]:
        """The client's index.json. Raises DataError when it is missing or broken."""
        if client not in self._indexes:
            self._indexes[client] = _read_json(self.root / client / INDEX_NAME)
        return self._indexes[client]

    def splits(self, client: str) -> list[str]:
        """The client's splits, those with samples."""
        return [name for name, part in self.index(client)["splits"].items() if part["samples"]]

    def num_samples(self, client: str, split: str) -> int:
        """Pairs of the client in `split`; 0 where it has no such split."""
        part = self.index(client)["splits"].get(split)
        return len(part["samples"]) if part else 0

    def samples(self, client: str, split: str) -> Samples:
        """The client's samples in index order. Raises DataError when the split is missing."""
        part = self.index(client)["splits"].get(split)
        if not part or not part["samples"]:
            have = ", ".join(self.splits(client)) or "nothing"
            raise DataError(f"{self.root / client / INDEX_NAME}: client {client} has no {split} split; it has {have}")
        rows = part["samples"]
        place = lambda *names: np.array(
            [next((row[n] for n in names if n in row), (-1, 0)) for row in rows], dtype=np.int64
        ).reshape(len(rows), 2)
        return Samples(
            client=client,
            split=split,
            paths=[str(self.root / client / shard["file"]) for shard in part["shards"]],
            keys=[row["key"] for row in rows],
            shard=np.array([row["shard"] for row in rows], dtype=np.int32),
            image=place(*IMAGE_SUFFIXES),
            text=place("txt"),
            info=place("json"),
            text_ids=np.array([int(row.get("text_id", "0"), 16) for row in rows], dtype=np.int64),
        )

    def shards(self, client: str) -> list[tuple[Path, dict[str, Any]]]:
        """(path, {file, bytes, sha256, samples}) of every shard of the client, over its splits."""
        parts = self.index(client)["splits"].values()
        return [(self.root / client / shard["file"], shard) for part in parts for shard in part["shards"]]

    def verify(self, progress: Callable[[str], None] | None = None) -> list[str]:
        """Compare every shard's sha256 with its index.json; a line for each that differs. Reads everything once."""
        problems = []
        for client in self.client_ids:
            for path, shard in self.shards(client):
                if progress is not None:
                    progress(f"{client}/{shard['file']}")
                try:
                    found = sha256_of(path)
                except OSError as error:
                    problems.append(f"{path}: cannot be read: {error.strerror}")
                    continue
                if found != shard["sha256"]:
                    problems.append(f"{path}: sha256 differs from {INDEX_NAME}: the shard was changed or damaged; "
                                    f"convert {client} again or restore the file")  # fmt: skip
        return problems


def open_dataset(root: str | Path, ids: Sequence[str] | None = None) -> Dataset:
    """Open the dataset under `root`; `ids` chooses and orders the clients (null: all but the held-out, sorted).

    Raises DataError for a missing root, a client that is not there, an index that cannot be read.
    """
    return Dataset(root, ids)


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def preflight(
    root: str | Path | None,
    ids: Sequence[str] | None,
    *,
    batch_size: int,
    eval_batch_size: int,
    eval_split: str | None,
    verify: bool,
    pooled: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Everything that training would trip over, a line each, beginning with the config key or the file.

    batch_size, eval_batch_size: data.batch_size and dro.evaluation_batch_size. eval_split: the split that retrieval is
    measured on, or None when it never is. pooled: the clients' pairs count together (the centralised strategy).
    Reads files only; needs no process group.
    """
    if root is None:
        return ["data.root: is needed; a folder that `feddra-ds data convert` or `feddra-ds data synth` wrote"]
    root = Path(root)
    problems, info, clients = _scan(root)
    if problems:
        return problems
    wanted = list(ids) if ids is not None else [c for c in clients if c not in set(info.get("held_out", []))]
    problems = _missing_clients(root, wanted, clients)
    if not wanted:
        problems.append(f"clients.ids: {root} has no client to train on")
    counts: dict[str, int] = {}
    without_split = []
    for client in (c for c in wanted if c in clients):
        try:
            dataset = Dataset(root, [client])
            problems += _shard_problems(dataset, client)
            counts[client] = dataset.num_samples(client, "train")
            if eval_split is not None and not dataset.num_samples(client, eval_split):
                without_split.append(client)
            if verify:
                problems += [p for p in dataset.verify(progress) if p.split(":")[0] not in " ".join(problems)]
        except DataError as error:
            problems += error.problems
    if pooled:
        counts = {"+".join(counts): sum(counts.values())} if counts else {}
    for client, count in counts.items():
        if count < batch_size:
            problems.append(
                f"data.batch_size: client {client} has {count} train pairs, fewer than a batch of {batch_size}; "
                "lower data.batch_size or leave the client out with clients.ids"
            )
        elif count < eval_batch_size:
            problems.append(f"dro.evaluation_batch_size: client {client} has {count} train pairs, fewer than "
                            f"{eval_batch_size}; lower it")  # fmt: skip
    if without_split:
        problems.append(f"evaluation.split: {', '.join(without_split)} has no {eval_split} split; "
                        "convert with --val-fraction, or set evaluation.every=0")  # fmt: skip
    return problems


def _scan(root: Path) -> tuple[list[str], dict[str, Any], list[str]]:
    """(problems, dataset.json or {}, sorted client folders) of a root."""
    if not root.is_dir():
        near = difflib.get_close_matches(root.name, _folders(root.parent), n=1) if root.parent.is_dir() else []
        hint = f"; did you mean {root.parent / near[0]}?" if near else "; `feddra-ds data convert` makes one"
        return [f"data.root: {root} is not a folder{hint}"], {}, []
    info: dict[str, Any] = {}
    if (root / DATASET_NAME).is_file():
        try:
            info = _read_json(root / DATASET_NAME)
        except DataError as error:
            return error.problems, {}, []
    clients = [name for name in _folders(root) if (root / name / INDEX_NAME).is_file()]
    if not clients:
        tars = sorted(root.glob("*/*.tar"))
        why = f"no folder under {root} has an {INDEX_NAME}; `feddra-ds data convert` makes them"
        if tars:
            why = f"{tars[0].parent} has no {INDEX_NAME}; `feddra-ds data inspect {root} --write-index` makes it"
        return [f"data.root: {why}"], info, []
    return [], info, clients


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _missing_clients(root: Path, wanted: Sequence[str], clients: list[str]) -> list[str]:
    problems = []
    for client in wanted:
        if client not in clients:
            near = difflib.get_close_matches(client, clients, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(f"clients.ids: no client {client} under {root}; {hint}there are: {', '.join(clients)}")
    return problems


def _shard_problems(dataset: Dataset, client: str) -> list[str]:
    """A missing, empty or half-written shard, each with its file."""
    problems = []
    for path, shard in dataset.shards(client):
        if not path.is_file():
            problems.append(f"{path}: is missing, though {INDEX_NAME} lists it with {shard['samples']} samples")
        elif (size := path.stat().st_size) != shard["bytes"]:
            state = "is empty" if size == 0 else "was half written or changed"
            problems.append(
                f"{path}: {state}: {size} bytes, not {shard['bytes']} as in {INDEX_NAME}; convert {client} again"
            )
        elif not shard["samples"]:
            problems.append(f"{path}: is an empty shard, with no samples; convert {client} again")
    return problems


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); was it cut off? convert again") from error
    if not isinstance(content, dict) or (path.name == INDEX_NAME and not _is_index(content)):
        raise DataError(f"{path}: is not a {FORMAT} file of version {VERSION}; convert again")
    return content


def _is_index(content: dict[str, Any]) -> bool:
    splits = content.get("splits")
    return content.get("version") == VERSION and isinstance(splits, dict) and all(
        isinstance(part, dict) and {"shards", "samples"} <= set(part) for part in splits.values()
    )  # fmt: skip
