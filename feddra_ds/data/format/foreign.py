"""Shards that others made, where they lie: which they are, and an index of them, made at first use into a cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import write_atomic
from feddra_ds.common.parse import OBJECT, parse_json
from feddra_ds.common.text import listed
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.indexing import Indexer
from feddra_ds.data.format.remote import Store, is_remote
from feddra_ds.data.format.text import is_lfs_file

logger = logging.getLogger("feddra_ds")

_VERSION = 1  # of what a cached index holds: a change of indexing.py that changes rows counts it up
_PATIENCE_S = 600.0  # without a further shard from the process that makes an index


def shards_of(key: str, given: str | Sequence[str], allow_pipe: bool) -> list[str]:
    """The shards that a value of the config names: tars of a folder, or files and addresses with webdataset's braces.

    key: the config's key, for messages. Raises DataError where there are none, where one is compressed, for a folder that
    is not there, and for a `pipe:` that was not allowed.
    """
    shards: list[str] = []
    for place in [given] if isinstance(given, str) else given:
        if place.startswith("pipe:") and not allow_pipe:
            raise DataError(f"{key}: pipe: runs a program here; it is refused unless data.streaming.allow_pipe is true")
        if not is_remote(place) and Path(place).is_dir():
            shards += _in_folder(key, Path(place))
        else:
            shards += _expanded(key, place)
    if twice := sorted({shard for shard in shards if shards.count(shard) > 1}):
        raise DataError(f"{key}: names shards twice: {listed(twice, 3)}")
    packed = [shard for shard in shards if shard.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))]
    if packed:
        raise DataError(f"{key}: {packed[0]} is compressed, so that no sample can be read without all before it; unpack it to a "
                        f".tar ({len(packed)} of {len(shards)} shards)")  # fmt: skip
    gone = [shard for shard in shards if not is_remote(shard) and not Path(shard).is_file()]
    if gone:
        raise DataError(f"{key}: {gone[0]} is not there ({len(gone)} of {len(shards)} shards are missing)")
    unfetched = [shard for shard in shards if not is_remote(shard) and is_lfs_file(Path(shard))]
    if unfetched:
        raise DataError(f"{key}: {unfetched[0]} is a Git-LFS pointer, not the shard ({len(unfetched)} of {len(shards)}); "
                        "git lfs pull fetches them")  # fmt: skip
    return shards


def _expanded(key: str, pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls  # on demand: it imports torch

    try:
        found: list[str] = expand_urls(pattern)
    except Exception as error:  # of braces that do not close, and of variables that are not set
        raise DataError(f"{key}: cannot read the pattern {pattern}: {error}") from error
    if found == [pattern] and not is_remote(pattern) and not Path(pattern).exists():
        raise DataError(f"{key}: {pattern} is neither a folder nor a shard")
    return found


def _in_folder(key: str, folder: Path) -> list[str]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    if not shards:
        packed = sorted(folder.glob("*.tar.*")) + sorted(folder.glob("*.tgz"))
        inside = sorted(folder.glob("*/*.tar"))
        hint = (
            f"; {packed[0].name} is compressed: unpack it"
            if packed
            else f"; there are in {inside[0].parent}"
            if inside
            else ""
        )
        raise DataError(f"{key}: {folder} has no .tar shards{hint}")
    return shards


def indexed(name: str, shards: Sequence[str], data: DataConfig, store: Store | None) -> dict[str, Any]:
    """The index of shards, {splits, notes}, from the cache where they have not changed, else made now and kept there.

    name: of the client or set, for messages. store: fetches what is not on a disk here. Processes that ask at once wait for
    the first. Raises DataError where a shard cannot be read, or has no sample.
    """
    path = cached_index(shards, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path, name) as lock:
        if path.is_file():
            with contextlib.suppress(OSError, ValueError):
                return parse_json(path.read_bytes(), OBJECT)
        logger.info("%s: making the index of %d shards, once, into %s", name, len(shards), path)
        indexer = Indexer(data.text_field, data.client_field, with_owner=True)
        for shard in shards:
            remote = store is not None and is_remote(shard)
            indexer.add(shard, store.first(shard) if store is not None and remote else Path(shard), digest=remote)
            os.utime(lock)
        made = {"splits": indexer.splits, "notes": indexer.notes}
        for note in indexer.notes:
            logger.warning("%s: %s", name, note)
        write_atomic(path, json.dumps(made))
    return made


def cache_folder(data: DataConfig) -> Path:
    """Where copies, indexes and counts of shards are kept."""
    return Path(data.streaming.cache_dir or Path.home() / ".cache" / "feddra_ds")


def cached_index(shards: Sequence[str], data: DataConfig) -> Path:
    """Where the index of these shards is, or will be."""
    return cache_folder(data) / "indexes" / f"{_digest(shards, data)}.json"


def _digest(shards: Sequence[str], data: DataConfig) -> str:
    """Of all that an index depends on; a shard at an address is taken to stay as it is."""
    places = [(shard, *_state(shard)) for shard in shards]
    return hashlib.sha256(repr((_VERSION, data.text_field, data.client_field, places)).encode()).hexdigest()[:24]


def _state(shard: str) -> tuple[int, ...]:
    if is_remote(shard):
        return ()
    found = os.stat(shard)
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _one_at_a_time(path: Path, name: str) -> Iterator[Path]:
    """One process makes an index, and touches the lock at every shard; the others wait for as long as it does."""
    place = path.with_suffix(".lock")
    with open(place, "a") as lock:
        start = time.time()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() - max(start, place.stat().st_mtime) > _PATIENCE_S:
                    raise DataError(
                        f"{name}: another process has made no progress with its index, {path}, for {_PATIENCE_S:.0f} s"
                    ) from None
                time.sleep(0.1)
        yield place


def by_client(index: dict[str, Any], client_field: str) -> dict[str, dict[str, Any]]:
    """An index for each client of a set, by the field of the json that names it; its rows have their `number` in their shard.

    Raises DataError where no pair has the field; pairs without it among others belong to nobody, and are counted.
    """
    clients: dict[str, dict[str, Any]] = {}
    without = 0
    for split, part in index["splits"].items():
        seen: Counter[int] = Counter()
        for row in part["samples"]:
            row["number"] = seen[row["shard"]]
            seen[row["shard"]] += 1
            if "client" not in row:
                without += 1
                continue
            own = clients.setdefault(row["client"], {"splits": {}, "notes": []})["splits"]
            own.setdefault(split, {"shards": part["shards"], "samples": []})["samples"].append(row)
    if not clients:
        raise DataError(f"data.client_field: none of the {without} pairs has {client_field} in its json")
    if without:
        logger.warning("data.client_field: %d pairs have no %s in their json and are left out", without, client_field)
    return dict(sorted(clients.items()))
