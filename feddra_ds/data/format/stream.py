"""One client's shards as webdataset reads them: sample after sample, without an index."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import write_atomic
from feddra_ds.common.text import listed
from feddra_ds.data.format.indexing import IMAGE_SUFFIXES, KNOWN, compressed
from feddra_ds.data.format.remote import OpenAhead, Store
from feddra_ds.data.format.samples import texts_of_json


@dataclass(frozen=True)
class Raw:
    """A sample as it is in its shard. members: by suffix (jpg, txt, json, …)."""

    key: str
    members: dict[str, bytes]
    text_field: str | None = None

    @property
    def image(self) -> bytes | None:
        """The encoded image, or None."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    def text(self, pick: int = 0) -> bytes | None:
        """The text as UTF-8 bytes, or None. pick: which of several, modulo their number."""
        if self.text_field is not None and "json" in self.members:
            texts = texts_of_json(self.members["json"], self.text_field)
            if texts:
                return texts[pick % len(texts)].encode()
        return self.members.get("txt")


class Keep(Protocol):
    """Which samples of shards are of one client's split."""

    def __call__(self, shard: int, number: int, key: str, info: bytes | None) -> bool:
        """Whether the sample `number` of a shard is, given its key and its json."""

    def check(self, shard: int, read: int) -> str | None:
        """What is wrong with a shard that had `read` samples in all; None where nothing is."""


@dataclass
class Shards:
    """The shards of one split of a client. places: paths or addresses. counts: their samples, None where not known yet.

    keep: which samples are of this client's split (None: all are). known: where counts are kept for the next process, or None.
    """

    client: str
    split: str
    places: list[str]
    counts: list[int | None]
    store: Store | None = None
    text_field: str | None = None
    keep: Keep | None = None
    known: Counts | None = None

    @property
    def total(self) -> int | None:
        """Samples of all shards; None where some have not been counted."""
        return None if None in self.counts else sum(count for count in self.counts if count is not None)

    def read(self, shard: int, ahead: OpenAhead | None = None) -> Iterator[Raw]:
        """The shard's samples that are of this split, in order; then its count is known. ahead: what may have opened it.

        Raises DataError where it cannot be read to its end.
        """
        number, read, names = 0, 0, "no members"
        for sample in self._samples(self.places[shard], ahead):
            members = {suffix: sample[suffix] for suffix in KNOWN if suffix in sample}
            if not members:
                others = [name for name in sample if not name.startswith("__")]
                names = f"e.g. {sample['__key__']} with {listed(others, 2)}"
                continue
            if self.keep is None or self.keep(shard, read, sample["__key__"], members.get("json")):
                number += 1
                yield Raw(sample["__key__"], members, self.text_field)
            read += 1
        if not read:
            raise DataError(f"{self.places[shard]}: has no sample of client {self.client}: webdataset reads {names}; a sample is "
                            "NAME.jpg, .png or .webp with NAME.txt or NAME.json, where NAME has no dot")  # fmt: skip
        if self.keep is not None and (wrong := self.keep.check(shard, read)) is not None:
            raise DataError(f"{self.places[shard]}: {wrong}")
        if self.counts[shard] is None:
            self.counts[shard] = number
            if self.known is not None:
                self.known.put(self.places[shard], self.split, number)

    def _samples(self, place: str, ahead: OpenAhead | None) -> Iterator[dict[str, Any]]:
        """webdataset's own samples of one shard."""
        from webdataset.tariterators import group_by_keys, tar_file_expander  # on demand: it imports torch

        try:
            with self._opened(place, ahead) as stream:
                if (problem := compressed(place, stream)) is not None:
                    raise DataError(problem)
                yield from group_by_keys(tar_file_expander([{"url": place, "stream": stream}]))
                stream.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
                if stream.read().strip(b"\0"):  # a tar ends in blocks of zeros; webdataset takes any end for one
                    raise EOFError("it ends without the mark of a tar's end; was it half written?")
        except OSError as error:
            raise DataError(f"{place}: cannot be read for client {self.client}: {error.strerror or error}") from error
        except DataError:
            raise
        except (tarfile.TarError, EOFError, ValueError) as error:
            why = str(error.args[0]) if error.args else type(error).__name__
            raise DataError(f"{place}: cannot be read to its end for client {self.client}: {why}") from error

    def _opened(self, place: str, ahead: OpenAhead | None) -> BinaryIO:
        if self.store is None:
            return open(place, "rb")
        return (ahead and ahead.take(place)) or self.store.opened(place)

    def up_to(self, wanted: int) -> int:
        """How many samples there are, or `wanted` where there are more: the same whatever was counted before."""
        found = sum(count for count in self.counts if count is not None)
        for shard, count in enumerate(self.counts):
            if count is None:
                for _ in self.read(shard) if found < wanted else ():
                    found += 1
                    if found >= wanted:
                        break
        return min(found, wanted)


@dataclass(frozen=True)
class Counts:
    """Samples of shards that were read to their end, kept in files of a folder for the processes that come after.

    about: what else than the shard a count depends on.
    """

    folder: Path
    about: str

    def get(self, place: str, split: str) -> int | None:
        """The count, or None where it is not known."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._path(place, split).read_text())
        return None

    def put(self, place: str, split: str, number: int) -> None:
        """Keep a count. A folder that cannot be written to keeps none."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._path(place, split)
            write_atomic(path.with_name(f"{path.name}.{os.getpid()}"), str(number))
            os.replace(path.with_name(f"{path.name}.{os.getpid()}"), path)

    def _path(self, place: str, split: str) -> Path:
        state: Sequence[int] = ()
        if os.path.exists(place):
            found = os.stat(place)
            state = (found.st_size, found.st_mtime_ns)
        return self.folder / hashlib.sha256(repr((self.about, place, split, *state)).encode()).hexdigest()[:24]
