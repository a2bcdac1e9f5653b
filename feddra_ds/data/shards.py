"""The shard contract: WebDataset tars plus an index which lists every sample's place in its tar.

    ROOT/dataset.json                        what the whole is: clients, held-out clients, how it was made
    ROOT/<client>/index.json                 each shard's bytes and sha256, each sample's key, offsets and text id
    ROOT/<client>/{train,val,test}-%06d.tar  <key>.{jpg|jpeg|png}, <key>.txt, <key>.json

Samples are read by offset with one `pread` each, so any order costs the same. Only jpg, jpeg, png, txt and json are
ever decoded: there is no pickle, and no member name chooses code.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from feddra_ds.data.remote import RemoteOptions, Store, is_remote
from feddra_ds.data.samples import DataError, Samples, sha256_of, text_id
from feddra_ds.logs import listed

__all__ = ["DataError", "Dataset", "Samples", "open_dataset", "preflight", "sha256_of", "text_id"]

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
INDEX_NAME, DATASET_NAME = "index.json", "dataset.json"
FORMAT, VERSION = "feddra-shards", 1
_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.tar", re.ASCII)  # an index is data: it must not name files elsewhere


class Dataset:
    """A folder, or an address, with one folder of shards per client.

    client_ids: those to train on. held_out: those kept for testing transfer. clients: all. info: dataset.json.
    """

    def __init__(self, root: str | Path, ids: Sequence[str] | None = None, options: RemoteOptions | None = None):
        self.options = options or RemoteOptions()
        self.store = Store(str(root), self.options) if is_remote(root) else None
        self.root = Path(root) if self.store is None else self.store.folder
        self.address = str(root)
        problems, self.info, self.clients = _scan(self.root) if self.store is None else _scan_remote(self.store)
        if problems:
            raise DataError(problems)
        held_out = set(self.info.get("held_out", []))
        self.held_out = [c for c in self.clients if c in held_out]
        self.client_ids = list(ids) if ids is not None else [c for c in self.clients if c not in held_out]
        missing = _missing_clients(self.address, self.client_ids, self.clients)
        if missing:
            raise DataError(missing)
        self._indexes: dict[str, dict[str, Any]] = {}

    def index(self, client: str) -> dict[str, Any]:
        """The client's index.json. Raises DataError when it is missing or broken."""
        if client not in self._indexes:
            if self.store is not None:
                self.store.text(f"{client}/{INDEX_NAME}")
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
            raise DataError(
                f"{self.address}/{client}/{INDEX_NAME}: client {client} has no {split} split; it has {have}"
            )
        rows = part["samples"]
        place = lambda *names: np.array(
            [next((row[n] for n in names if n in row), (-1, 0)) for row in rows], dtype=np.int64
        ).reshape(len(rows), 2)
        return Samples(
            store=self.store,
            client=client,
            split=split,
            paths=[self._place(client, shard) for shard in part["shards"]],
            keys=[row["key"] for row in rows],
            shard=np.array([row["shard"] for row in rows], dtype=np.int32),
            image=place(*IMAGE_SUFFIXES),
            text=place("txt"),
            info=place("json"),
            text_ids=np.array([int(row.get("text_id", "0"), 16) for row in rows], dtype=np.int64),
        )

    def _place(self, client: str, shard: dict[str, Any]) -> str:
        if self.store is None:
            return str(self.root / client / shard["file"])
        return self.store.expect(f"{client}/{shard['file']}", shard["bytes"], shard["sha256"])

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
                    found = sha256_of(path if self.store is None else self.store.local(self._place(client, shard)))
                except OSError as error:
                    problems.append(f"{path}: cannot be read: {error.strerror}")
                    continue
                except DataError as error:  # a remote shard is checked as it arrives
                    problems += error.problems
                    continue
                if found != shard["sha256"]:
                    problems.append(f"{path}: sha256 differs from {INDEX_NAME}: the shard was changed or damaged; "
                                    f"convert {client} again or restore the file")  # fmt: skip
        return problems


def open_dataset(root: str | Path, ids: Sequence[str] | None = None, options: RemoteOptions | None = None) -> Dataset:
    """Open the dataset under `root`; `ids` chooses and orders the clients (null: all but the held-out, sorted).

    root: a folder, or an address (https://, s3://, …), whose files are fetched as `options` say.
    Raises DataError for a missing root, a client that is not there, an index that cannot be read.
    """
    return Dataset(root, ids, options)


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
    options: RemoteOptions | None = None,
) -> list[str]:
    """Everything that training would trip over, a line each, beginning with the config key or the file.

    batch_size, eval_batch_size: data.batch_size and dro.evaluation_batch_size. eval_split: the split that retrieval is
    measured on, or None when it never is. pooled: the clients' pairs count together (the centralised strategy).
    Reads files only; needs no process group.
    """
    if root is None:
        return ["data.root: is needed; a folder that `feddra-ds data convert` or `feddra-ds data synth` wrote"]
    try:
        whole = Dataset(root, [], options)
    except DataError as error:
        return error.problems
    clients = whole.clients
    wanted = list(ids) if ids is not None else [c for c in clients if c not in whole.held_out]
    problems = _missing_clients(str(root), wanted, clients)
    if ids is None:
        problems += lost_folders(whole)
    if not wanted:
        problems.append(f"clients.ids: {root} has no client to train on")
    counts: dict[str, int] = {}
    without_split = []
    for client in (c for c in wanted if c in clients):
        try:
            dataset = Dataset(root, [client], options)
            problems += _shard_problems(dataset, client) if dataset.store is None else []
            counts[client] = dataset.num_samples(client, "train")
            if eval_split is not None and not dataset.num_samples(client, eval_split):
                without_split.append(client)
            if verify:
                problems += [p for p in dataset.verify(progress) if p.split(":")[0] not in " ".join(problems)]
        except DataError as error:
            problems += error.problems
    if pooled:
        counts = {"+".join(counts): sum(counts.values())} if counts else {}
    small = [client for client, count in counts.items() if count < batch_size]
    if small:
        problems.append(f"data.batch_size: fewer train pairs than a batch of {batch_size}: {_with(counts, small)}; "
                        "lower data.batch_size, or leave them out with clients.ids")  # fmt: skip
    few = [client for client, count in counts.items() if batch_size <= count < eval_batch_size]
    if few:
        problems.append(f"dro.evaluation_batch_size: fewer train pairs than {eval_batch_size}: {_with(counts, few)}; "
                        f"set it to {min(counts[c] for c in few)} or less")  # fmt: skip
    if without_split:
        problems.append(f"evaluation.split: no {eval_split} split: {listed(without_split)}; "
                        "convert with --val-fraction, or set evaluation.every=0")  # fmt: skip
    return problems


def _with(counts: dict[str, int], clients: Sequence[str]) -> str:
    return listed([f"{client} ({counts[client]})" for client in clients])


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


def _scan_remote(store: Store) -> tuple[list[str], dict[str, Any], list[str]]:
    """The same of an address, by its dataset.json."""
    try:
        store.text(DATASET_NAME)
        info = _read_json(store.folder / DATASET_NAME)
    except DataError as error:
        return [f"data.root: {problem}" for problem in error.problems], {}, []
    clients = sorted({*info.get("clients", []), *info.get("held_out", [])})
    unsafe = [c for c in clients if not isinstance(c, str) or not re.fullmatch(r"[\w-]+", c, re.ASCII)]
    if unsafe or not clients:
        return [f"data.root: {store.address(DATASET_NAME)}: names no clients, or bad ones: {unsafe}"], {}, []
    return [], info, clients


def lost_folders(dataset: Dataset) -> list[str]:
    """A line where dataset.json names clients that have no folder any more."""
    named = dict.fromkeys([*dataset.info.get("clients", []), *dataset.info.get("held_out", [])])
    lost = [client for client in named if client not in dataset.clients]
    if not lost:
        return []
    return [
        f"data.root: {dataset.address}/{DATASET_NAME} names {listed(lost)}, but there is no such folder with an {INDEX_NAME}; "
        "bring it back, or say with clients.ids who takes part"
    ]


def _missing_clients(root: str, wanted: Sequence[str], clients: list[str]) -> list[str]:
    problems = []
    for client in wanted:
        if client not in clients:
            near = difflib.get_close_matches(client, clients, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(f"clients.ids: no client {client} under {root}; {hint}there are: {listed(clients, 20)}")
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
    if content.get("version") != VERSION or not isinstance(splits, dict):
        return False
    if not all(isinstance(part, dict) and {"shards", "samples"} <= set(part) for part in splits.values()):
        return False
    return all(_SHARD_NAME.fullmatch(shard["file"]) for part in splits.values() for shard in part["shards"])
