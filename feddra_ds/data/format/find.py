"""What lies under a root: which folders are clients, what their files are called, and reading those that describe them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from feddra_ds.common.errors import DataError
from feddra_ds.common.parse import parse_json
from feddra_ds.common.text import printable
from feddra_ds.data.format.remote import Store

INDEX_NAME, DATASET_NAME = "index.json", "dataset.json"
FORMAT, VERSION = "feddra-shards", 1
# An index may come from anybody, so it must not name files outside its folder.
_SHARD_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar$"
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Place = Annotated[list[Annotated[int, Field(ge=-1, lt=2**62)]], Field(min_length=2, max_length=2)]


class _Row(TypedDict):
    key: str
    shard: Annotated[int, Field(ge=0, lt=2**31)]
    text_id: NotRequired[Annotated[str, Field(pattern="^[0-7]?[0-9a-f]{1,15}$")]]
    group: NotRequired[Annotated[str, Field(pattern="^[0-9a-f]{1,16}$")]]
    jpg: NotRequired[_Place]
    jpeg: NotRequired[_Place]
    png: NotRequired[_Place]
    webp: NotRequired[_Place]
    txt: NotRequired[_Place]
    json: NotRequired[_Place]


class _Shard(TypedDict):
    file: Annotated[str, Field(pattern=_SHARD_NAME)]
    bytes: _Count
    sha256: NotRequired[str]
    samples: _Count


class _Part(TypedDict):
    shards: list[_Shard]
    samples: list[_Row]


class _Index(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    version: Literal[1]
    splits: dict[str, _Part]
    text_field: NotRequired[str | None]


class _Info(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    clients: NotRequired[list[str]]
    held_out: NotRequired[list[str]]


_INDEX, _DATASET = TypeAdapter(_Index), TypeAdapter(_Info)


def safe_name(value: str) -> str:
    """A client id or sample key as a file name: letters, digits, `_` and `-`; anything else becomes `_`."""
    return re.sub(r"[^\w-]+", "_", value.strip(), flags=re.ASCII).strip("_") or "_"


def scan(root: Path) -> tuple[list[str], dict[str, Any], list[str]]:
    """(problems, dataset.json or {}, sorted client folders) of a root."""
    if not root.is_dir():
        near = difflib.get_close_matches(root.name, _folders(root.parent), n=1) if root.parent.is_dir() else []
        hint = f"; did you mean {root.parent / near[0]}?" if near else "; `feddra-ds data convert` makes one"
        return [f"data.root: {root} is not a folder{hint}"], {}, []
    info: dict[str, Any] = {}
    if (root / DATASET_NAME).is_file():
        try:
            info = read_json(root / DATASET_NAME)
        except DataError as error:
            return error.problems, {}, []
    clients = [name for name in _folders(root) if (root / name / INDEX_NAME).is_file()]
    tars = sorted(root.glob("*/*.tar"))
    if not info:  # shards from elsewhere; a dataset written here that has lost an index is damaged
        clients = sorted({*clients, *(path.parent.name for path in tars if not path.parent.name.startswith("."))})
    if not clients:
        why = f"no folder under {root} has an {INDEX_NAME} or shards; `feddra-ds data convert` makes them"
        if tars:
            why = f"{tars[0].parent} has no {INDEX_NAME}; `feddra-ds data inspect {root} --write-index` makes it"
        elif any(root.glob("*.tar")):
            why = (f"{root} has shards, but no folder per client; data.clients: {{NAME: {root}}} makes them one client's, "
                   "data.client_field splits them by a field of their json")  # fmt: skip
        elif packed := next(root.glob("*/*.tar.*"), None):
            why = f"{packed} is compressed, so that no sample can be read without all before it; unpack it to a .tar"
        return [f"data.root: {why}"], info, []
    return [], info, clients


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def scan_remote(store: Store) -> tuple[list[str], dict[str, Any], list[str]]:
    """What `scan` returns, for an address: its dataset.json names the clients."""
    try:
        store.refresh(DATASET_NAME)
        info = read_json(store.folder / DATASET_NAME)
    except DataError as error:
        return [f"data.root: {problem}" for problem in error.problems], {}, []
    clients = sorted({*info.get("clients", []), *info.get("held_out", [])})
    unsafe = [c for c in clients if not isinstance(c, str) or not re.fullmatch(r"[\w-]+", c, re.ASCII)]
    if unsafe or not clients:
        return [f"data.root: {store.address(DATASET_NAME)}: names no clients, or bad ones: {unsafe}"], {}, []
    return [], info, clients


def read_json(path: Path) -> dict[str, Any]:
    """An index.json or dataset.json. Raises DataError."""
    kind: TypeAdapter[Any] = _INDEX if path.name == INDEX_NAME else _DATASET
    try:
        content: dict[str, Any] = parse_json(path.read_bytes(), kind)
        for split, part in content["splits"].items() if path.name == INDEX_NAME else ():
            last = max((row["shard"] for row in part["samples"]), default=-1)
            if last >= len(part["shards"]):
                raise ValueError(f"splits.{printable(split)}: a sample is in shard {last} of {len(part['shards'])}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        cut = "; was it cut off?" if str(error).startswith("Invalid JSON") else ""
        raise DataError(f"{path}: is not a {FORMAT} file of version {VERSION} ({error}){cut}; convert again") from error
    return content
