"""One client's samples of one split: where each lies in its shard, and reading it from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from feddra_ds.data.format.remote import Store


_MAX_OPEN_SHARDS = 64


def text_id(text: str) -> int:
    """A 63-bit hash of the whitespace-normalised text: equal for identical reports, everywhere and for ever."""
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def text_of_json(data: bytes, field_name: str) -> bytes | None:
    """The text in a field of a sample's json member, as UTF-8; None where there is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    value = found.get(field_name) if isinstance(found, dict) else None
    return value.encode() if isinstance(value, str) else None


@dataclass
class Samples:
    """Where one client's samples of one split lie.

    paths: the shards, or their addresses where `store` fetches them. shard: (n,) int32, each sample's place in paths.
    image, text, info: (n, 2) int64, offset and length of the member; -1 says that it is missing. text_ids: (n,) int64.
    text_field: the field of the json member that is the text of a sample without a txt.
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
    store: Store | None = None
    text_field: str | None = None
    _files: OrderedDict[int, int] = field(default_factory=OrderedDict, repr=False, compare=False)

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
            store=self.store,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors belong to one process

    def read_image(self, index: int) -> bytes | None:
        """The encoded image, or None where the sample has none. Raises EOFError when the shard ends too early."""
        return self._read(index, self.image)

    def read_text(self, index: int) -> bytes | None:
        """The text as UTF-8 bytes, or None where the sample has none. Raises EOFError when the shard ends too early."""
        if self.text_field is not None and int(self.text[index, 0]) < 0:
            data = self._read(index, self.info)
            return None if data is None else text_of_json(data, self.text_field)
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
            path = self.paths[shard] if self.store is None else self.store.local(self.paths[shard])
            found = self._files[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
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
