"""One client's samples of one split: where each lies in its shard, and reading it from there."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from feddra_ds.common.parse import OBJECT, parse_json

if TYPE_CHECKING:
    from feddra_ds.data.format.remote import Store


_MAX_OPEN_FILES = 128  # of a process, over all clients and splits
_owners: itertools.count[int] = itertools.count()


def text_id(text: str) -> int:
    """A 63-bit hash of the whitespace-normalised text: equal for identical reports, everywhere and for ever."""
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def texts_of_json(data: bytes, field_name: str) -> list[str]:
    """The text, or the texts, in a field of a sample's json member; none where it has no such field."""
    try:
        found: Any = parse_json(data)
    except ValueError:
        return []
    value = found.get(field_name) if isinstance(found, dict) else None
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


@dataclass
class Samples:
    """Where one client's samples of one split lie.

    paths: the shards, or their addresses where `store` fetches them. shard: (n,) int32, each sample's place in paths.
    image, text, info: (n, 2) int64, offset and length of the member; -1 says that it is missing. text_ids: (n,) int64.
    text_field: the field of the json member that is the text, or a list of texts; the txt where the json has none. groups:
    (n,) uint64, what val_fraction goes by (split_by_hash), where the index has it. number: (n,) int32, each sample's place
    among all of its shard, of which `shard_sizes` says how many there are, whoever's they are.
    """

    client: str
    split: str
    paths: list[str]
    keys: list[str]
    shard: np.ndarray
    image: np.ndarray
    text: np.ndarray
    info: np.ndarray
    text_ids: np.ndarray
    number: np.ndarray
    shard_sizes: list[int]
    store: Store | None = None
    text_field: str | None = None
    groups: np.ndarray | None = None
    _own: int = field(default_factory=lambda: next(_owners), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, chosen: np.ndarray, split: str) -> Samples:
        """Those that `chosen` names, (n,) bool, in order, as a split of their own over the same shards."""
        rows = np.flatnonzero(chosen)
        return Samples(
            client=self.client,
            split=split,
            paths=self.paths,
            keys=[self.keys[i] for i in rows],
            shard=self.shard[rows],
            image=self.image[rows],
            text=self.text[rows],
            info=self.info[rows],
            text_ids=self.text_ids[rows],
            number=self.number[rows],
            shard_sizes=self.shard_sizes,
            store=self.store,
            text_field=self.text_field,
            groups=None if self.groups is None else self.groups[rows],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own"}  # open files are of one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _own=next(_owners))

    def read_image(self, index: int) -> bytes | None:
        """The encoded image, or None where the sample has none. Raises EOFError when the shard ends too early."""
        return self._read(index, self.image)

    def read_text(self, index: int, pick: int = 0) -> bytes | None:
        """The text as UTF-8 bytes, or None where the sample has none. Raises EOFError when the shard ends too early.

        pick: which of several texts, modulo their number.
        """
        if self.text_field is not None:
            data = self._read(index, self.info)
            texts = [] if data is None else texts_of_json(data, self.text_field)
            if texts:
                return texts[pick % len(texts)].encode()
        return self._read(index, self.text)

    def read_info(self, index: int) -> dict[str, Any]:
        """The sample's json member ({} where there is none): labels, site, patient, … Raises ValueError where it is no object."""
        raw = self._read(index, self.info)
        return {} if raw is None else parse_json(raw, OBJECT)

    def _read(self, index: int, member: np.ndarray) -> bytes | None:
        offset, length = int(member[index, 0]), int(member[index, 1])
        if offset < 0:
            return None
        shard = self.paths[int(self.shard[index])]
        data = _open_files.read(self._own, shard, self._open, length, offset)
        if len(data) != length:
            raise EOFError(f"{shard} ends before sample {self.keys[index]}")
        return data

    def _open(self, shard: str) -> int:
        if self.store is None:
            return os.open(shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        with self.store.opened(shard) as file:
            return os.dup(file.fileno())

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        _open_files.close(self._own)

    def __del__(self) -> None:
        self.close()


class _OpenFiles:
    """The shards that this process reads by offset: those used last stay open, few enough for any limit on descriptors."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[tuple[int, str], int] = OrderedDict()  # by owner and shard
        self._lock = (
            threading.RLock()
        )  # a file that is read is not closed; a finaliser may close while its thread reads

    def read(self, owner: int, shard: str, open_shard: Callable[[str], int], length: int, offset: int) -> bytes:
        """Up to `length` bytes from `offset` on. Raises what opening and reading raise."""
        with self._lock:
            if (owner, shard) in self._descriptors:
                self._descriptors.move_to_end((owner, shard))
                return os.pread(self._descriptors[owner, shard], length, offset)
        descriptor = open_shard(shard)  # which may fetch it first
        with self._lock:
            other = self._descriptors.pop((owner, shard), None)
            self._descriptors[owner, shard] = descriptor
            if other is not None:
                os.close(other)
            while len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            return os.pread(descriptor, length, offset)

    def close(self, owner: int) -> None:
        """Close what one owner has open."""
        with self._lock:
            for key in [key for key in self._descriptors if key[0] == owner]:
                os.close(self._descriptors.pop(key))


_open_files = _OpenFiles()
