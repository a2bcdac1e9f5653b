"""The shard contract: WebDataset tars plus an index which lists every sample's place in its tar.

    ROOT/dataset.json                        what the whole is: clients, held-out clients, how it was made
    ROOT/<client>/index.json                 each shard's bytes and sha256, each sample's key, offsets and text id
    ROOT/<client>/{train,val,test}-%06d.tar  <key>.{jpg|jpeg|png}, <key>.txt, <key>.json

Samples are read by offset with one `pread` each, so any order costs the same. Only jpg, jpeg, png, webp, txt and json
are ever decoded: there is no pickle, and no member name chooses code.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import sha256
from feddra_ds.common.text import listed, printable
from feddra_ds.config.schema import DataConfig, StreamingConfig
from feddra_ds.data.format.find import INDEX_NAME, read_json, safe_name, scan, scan_remote
from feddra_ds.data.format.foreign import by_client, cache_folder, cached_index, indexed, shards_of
from feddra_ds.data.format.indexing import IMAGE_SUFFIXES, split_of
from feddra_ds.data.format.keep import Among, BySide
from feddra_ds.data.format.remote import Store, is_remote
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.format.split_by_hash import group_hash, is_val
from feddra_ds.data.format.stream import Counts, Shards

ENOUGH = 4096  # of pairs that streaming counts before it starts


class Dataset:
    """A folder, or an address, with one folder of shards per client; or shards from elsewhere (data.clients, data.client_field).

    client_ids: those to train on. held_out: those kept for testing transfer. clients: all. info: dataset.json. data: how the
    config wants them read: clients, client_field, text_field, val_fraction.
    """

    def __init__(
        self,
        root: str | Path | None,
        ids: Sequence[str] | None = None,
        options: StreamingConfig | None = None,
        data: DataConfig | None = None,
    ):
        self.data = data or DataConfig()
        self.options = options or self.data.streaming
        self._bare: dict[str, list[str]] = {}  # by client, shards whose index is made at first use
        self._indexes: dict[str, dict[str, Any]] = {}
        if self.data.clients is not None or self.data.client_field is not None:
            self._open_foreign(root)
        else:
            assert root is not None
            self._open_root(root)
        if odd := [client for client in self.clients if not client.isprintable()]:
            raise DataError(
                f"{self.address}: client names with control characters: {listed(odd)}; rename their folders"
            )
        held_out = set(self.info.get("held_out", []))
        self.held_out = [c for c in self.clients if c in held_out]
        self._own_val: dict[str, np.ndarray] = {}  # by client, (n,) bool over its train samples: see `make_val`
        self._hashed: dict[str, np.ndarray | None] = {}  # likewise, by data.val_fraction
        self._streams: dict[tuple[str, str], Shards] = {}
        self.client_ids: list[str] = []
        self.choose(ids)

    def _open_root(self, root: str | Path) -> None:
        self.store = Store(str(root), self.options) if is_remote(root) else None
        self.root = Path(root) if self.store is None else self.store.folder
        self.address = str(root)
        problems, self.info, self.clients = scan(self.root) if self.store is None else scan_remote(self.store)
        if problems:
            raise DataError(problems)
        if self.store is None:
            bare = [client for client in self.clients if not (self.root / client / INDEX_NAME).is_file()]
            self._bare = {client: shards_of("data.root", str(self.root / client), False) for client in bare}

    def _open_foreign(self, root: str | Path | None) -> None:
        """Shards that data.clients names, or the one set under `root` that data.client_field splits."""
        self.info = {}
        allow = self.options.allow_pipe
        if self.data.clients is not None:
            self.root, self.address = Path("data.clients"), "data.clients"
            self._bare = {name: shards_of(f"data.clients.{name}", at, allow) for name, at in self.data.clients.items()}
            self.clients = list(self._bare)
            self.store = self._store_of([shard for own in self._bare.values() for shard in own])
            return
        assert self.data.client_field is not None
        self.root, self.address = Path(str(root)), str(root)
        shards = shards_of("data.root", str(root), allow)
        self.store = self._store_of(shards)
        whole = indexed(self.address, shards, self.data, self.store)
        found = by_client(whole, self.data.client_field)
        self._indexes = {safe_name(name): own for name, own in found.items()}
        self.clients = sorted(self._indexes)
        if len(found) > len(self._indexes):
            raise DataError(
                f"data.client_field: the clients {listed(list(found))} share folders when other letters become _"
            )

    def _store_of(self, shards: Sequence[str]) -> Store | None:
        """What fetches the shards; None where all lie on a disk here."""
        return Store("", self.options) if any(is_remote(shard) for shard in shards) else None

    def choose(self, ids: Sequence[str] | None) -> None:
        """Set which clients to train on, in this order (None: all but the held-out). Raises DataError where one is not here."""
        wanted = self.wanted(ids)
        missing = self.missing(wanted)
        if missing:
            raise DataError(missing)
        self.client_ids = wanted

    def wanted(self, ids: Sequence[str] | None) -> list[str]:
        """The ids themselves; for None all clients but the held-out."""
        return list(ids) if ids is not None else [c for c in self.clients if c not in self.held_out]

    def missing(self, ids: Sequence[str]) -> list[str]:
        """A line for each of the ids that is no client here."""
        problems = []
        for client in ids:
            if client not in self.clients:
                near = difflib.get_close_matches(client, self.clients, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                have = listed(self.clients, 20)
                problems.append(f"clients.ids: no client {client} under {self.address}; {hint}there are: {have}")
        return problems

    def is_uncounted(self, client: str) -> bool:
        """Whether the client streams shards that nobody has made an index of: their samples are counted as they are read."""
        return self.data.order == "streaming" and not self.has_index(client)

    def has_index(self, client: str) -> bool:
        """Whether there is an index of the client's shards, or one was made of them; else `index` has to read them all."""
        is_made = client in self._indexes or client not in self._bare
        return is_made or cached_index(self._bare[client], self.data).is_file()

    def has_own_index(self, client: str) -> bool:
        """Whether its index lies beside its shards; else it was made here, at first use."""
        return client not in self._bare and self.data.client_field is None

    def stream(self, client: str, split: str) -> Shards:
        """The client's shards of a split, for data.order=streaming; the same object each time. Raises DataError without any."""
        if (client, split) not in self._streams:
            made = self._stream_bare if self.is_uncounted(client) else self._stream_indexed
            self._streams[client, split] = made(client, split)
        return self._streams[client, split]

    def _stream_bare(self, client: str, split: str) -> Shards:
        places: dict[str, list[str]] = {}
        for place in self._bare[client]:
            places.setdefault(split_of(place), []).append(place)
        fraction, keep = self.data.val_fraction, None
        if fraction is not None and "val" not in places and split in ("train", "val"):
            keep = BySide(fraction, split)
        own = places.get("train" if keep is not None else split, [])
        if not own:
            have = ", ".join(places)
            raise DataError(f"{self.address}/{client}: client {client} has no {split} split; it has {have}")
        known = Counts(cache_folder(self.data) / "counts", repr((fraction if keep is not None else None,)))
        counts = [known.get(place, split) for place in own]
        return Shards(client, split, own, counts, self.store, self.data.text_field, keep, known)

    def _stream_indexed(self, client: str, split: str) -> Shards:
        """The shards that have samples of the client's split, which the index tells from others by their number in the shard."""
        samples = self.samples(client, split)
        own: list[list[int]] = [[] for _ in samples.paths]
        for shard, number in zip(samples.shard.tolist(), samples.number.tolist(), strict=True):
            own[shard].append(number)
        used = [i for i, numbers in enumerate(own) if numbers]
        keep = Among([frozenset(own[i]) for i in used], [samples.shard_sizes[i] for i in used])
        counts: list[int | None] = [len(own[i]) for i in used]
        return Shards(client, split, [samples.paths[i] for i in used], counts, self.store, samples.text_field, keep)

    def index(self, client: str) -> dict[str, Any]:
        """The client's index.json, or the one made of its shards. Raises DataError when it is missing or broken."""
        if client not in self._indexes:
            if client in self._bare:
                self._indexes[client] = indexed(client, self._bare[client], self.data, self.store)
            else:
                if self.store is not None:
                    self.store.refresh(f"{client}/{INDEX_NAME}")
                self._indexes[client] = read_json(self.root / client / INDEX_NAME)
        return self._indexes[client]

    def splits(self, client: str) -> list[str]:
        """The client's splits, those with samples."""
        if self.is_uncounted(client):
            named = list(dict.fromkeys(split_of(place) for place in self._bare[client]))
            return named if self.data.val_fraction is None or "val" in named else [*named, "val"]
        found = [name for name, part in self.index(client)["splits"].items() if part["samples"]]
        return found if self._chosen(client) is None or "val" in found else [*found, "val"]

    def make_val(self, client: str, fraction: float, at_least: int, seed: int) -> None:
        """Take a seeded slice out of the train split of a client that has no val split: it is that from now on.

        It has `fraction` of the pairs, or `at_least` so many; all pairs of one report are on one side. For this object
        alone: nothing is written, and the same arguments give the same slice.
        """
        assert not self.num_samples(client, "val"), client
        if self.is_uncounted(client):
            raise DataError(
                f"dro.evaluate_on: val needs a val split, and client {client} has none; data.val_fraction makes one"
            )
        ids = self.samples(client, "train").text_ids
        texts, sizes = np.unique(ids, return_counts=True)
        key = lambda text: hashlib.blake2b(f"holdout {seed} {client} {text}".encode(), digest_size=8).digest()
        drawn = np.array(sorted(range(len(texts)), key=lambda i: key(texts[i])), dtype=np.int64)
        wanted = max(at_least, round(fraction * len(ids)))
        num_texts = int(np.searchsorted(np.cumsum(sizes[drawn]), wanted)) + 1
        self._own_val[client] = np.isin(ids, texts[drawn[:num_texts]])

    @property
    def without_val(self) -> list[str]:
        """The clients whose val split is a slice of train (`make_val`)."""
        return list(self._own_val)

    def num_samples(self, client: str, split: str) -> int:
        """Pairs of the client in `split`; 0 where it has no such split. Where nobody has counted them (`is_uncounted`),
        ENOUGH stands for that many and more."""
        if self.is_uncounted(client):
            return self.stream(client, split).up_to(ENOUGH) if split in self.splits(client) else 0
        chosen = self._chosen(client) if split in ("train", "val") else None
        if chosen is not None:
            return int(chosen.sum() if split == "val" else (~chosen).sum())
        part = self.index(client)["splits"].get(split)
        return len(part["samples"]) if part else 0

    def samples(self, client: str, split: str) -> Samples:
        """The client's samples in index order. Raises DataError when the split is missing."""
        chosen = self._chosen(client) if split in ("train", "val") else None
        if chosen is not None:
            return self._samples(client, "train").part(chosen if split == "val" else ~chosen, split)
        return self._samples(client, split)

    def _chosen(self, client: str) -> np.ndarray | None:
        """(n,) bool: which of its train samples are the client's val split; None where it has one of its own, or none."""
        if client in self._own_val or self.data.val_fraction is None:
            return self._own_val.get(client)
        if client not in self._hashed:
            parts = self.index(client)["splits"]
            has_val = bool(parts.get("val", {}).get("samples"))
            split_here = not has_val and bool(parts.get("train", {}).get("samples")) and client not in self.held_out
            groups = _groups(self._samples(client, "train")) if split_here else None
            self._hashed[client] = None if groups is None else is_val(groups, self.data.val_fraction)
        return self._hashed[client]

    def _samples(self, client: str, split: str) -> Samples:
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
        made = Samples(
            store=self.store,
            text_field=self.data.text_field or self.index(client).get("text_field"),
            client=client,
            split=split,
            paths=[self._place(client, shard) for shard in part["shards"]],
            keys=[row["key"] for row in rows],
            shard=np.array([row["shard"] for row in rows], dtype=np.int32),
            image=place(*IMAGE_SUFFIXES),
            text=place("txt"),
            info=place("json"),
            text_ids=np.array([int(row.get("text_id", "0"), 16) for row in rows], dtype=np.int64),
            groups=np.array([int(r["group"], 16) for r in rows], dtype=np.uint64) if "group" in rows[0] else None,
            number=_numbers(rows),
            shard_sizes=[shard["samples"] for shard in part["shards"]],
        )
        _check_places(
            made, np.array([shard["bytes"] for shard in part["shards"]]), f"{self.address}/{client}/{INDEX_NAME}"
        )
        return made

    def _place(self, client: str, shard: dict[str, Any]) -> str:
        is_own = self.has_own_index(client)
        if self.store is None or not (is_own or is_remote(shard["file"])):
            return str(self.root / client / shard["file"]) if is_own else str(shard["file"])
        address = self.store.address(f"{client}/{shard['file']}") if is_own else shard["file"]
        return self.store.expect(address, shard["bytes"], shard["sha256"])

    def shards(self, client: str) -> list[tuple[Path, dict[str, Any]]]:
        """(path, {file, bytes, sha256, samples}) of every shard of the client, over its splits; none where there is no index."""
        if self.is_uncounted(client):
            return []
        parts = self.index(client)["splits"].values()
        return [
            (self.root / client / shard["file"], shard) for part in parts for shard in part["shards"]
        ]  # or the file's own path

    def verify(self, clients: Sequence[str] | None = None, progress: Callable[[str], None] | None = None) -> list[str]:
        """Compare every shard's sha256 with its index.json; a line for each that differs. Reads everything once.

        clients: whose shards (None: client_ids). progress: is called with `<client>/<file>` before each.
        """
        problems = []
        for client in self.client_ids if clients is None else clients:
            for path, shard in self.shards(client):
                if progress is not None:
                    progress(f"{client}/{shard['file']}")
                problems += self.verify_shard(client, path, shard)
        return problems

    def verify_shard(self, client: str, path: Path, shard: dict[str, Any]) -> list[str]:
        """The same for one of `shards`; nothing where its index was made here, of what is there, without a sha256."""
        if "sha256" not in shard:
            return []
        try:
            found = sha256(self.at_hand(client, shard))
        except OSError as error:
            return [f"{path}: cannot be read: {error.strerror}"]
        except DataError as error:  # a remote shard is checked as it arrives
            return list(error.problems)
        if found == shard["sha256"]:
            return []
        return [f"{path}: sha256 differs from {INDEX_NAME}: the shard was changed or damaged; convert {client} again or restore "
                "the file"]  # fmt: skip

    def at_hand(self, client: str, shard: dict[str, Any]) -> Path:
        """A client's shard on this disk, fetched where it is not here. Raises DataError."""
        place = self._place(client, shard)
        return Path(place) if self.store is None else self.store.at_hand(place)


def open_dataset(
    root: str | Path | None,
    ids: Sequence[str] | None = None,
    options: StreamingConfig | None = None,
    data: DataConfig | None = None,
) -> Dataset:
    """Open the dataset under `root`; `ids` chooses and orders the clients (null: all but the held-out, sorted).

    root: a folder, or an address (https://, s3://, …), whose files are fetched as `options` say; None where `data` names
    shards (data.clients). data: how the config wants them read. Raises DataError for a missing root, a client that is not
    there, an index that cannot be read.
    """
    return Dataset(root, ids, options, data)


def _check_places(samples: Samples, sizes: np.ndarray, name: str) -> None:
    """Raise DataError where a member lies outside its shard of `sizes` bytes, or where two samples say that it is theirs."""
    for what, member in (("image", samples.image), ("text", samples.text), ("json", samples.info)):
        is_there = member[:, 0] >= 0
        outside = is_there & (member.sum(axis=1) > sizes[samples.shard])
        if outside.any():
            key = samples.keys[int(outside.argmax())]
            raise DataError(f"{name}: the {what} of sample {printable(key)} lies outside its shard; convert again")
        shards, starts = samples.shard[is_there], member[is_there, 0]
        order = np.lexsort((starts, shards))
        if ((np.diff(shards[order]) == 0) & (np.diff(starts[order]) == 0)).any():
            raise DataError(f"{name}: two samples of {samples.split} have the same {what}; convert again")


def _numbers(rows: list[dict[str, Any]]) -> np.ndarray:
    """(n,) int32: each row's number in its shard. Rows of one client among others (`by_client`) say it themselves."""
    seen: Counter[int] = Counter()
    numbers = []
    for row in rows:
        numbers.append(row.get("number", seen[row["shard"]]))
        seen[row["shard"]] += 1
    return np.array(numbers, dtype=np.int32)


def _groups(samples: Samples) -> np.ndarray:
    """(n,) uint64: what val_fraction goes by, from the index, or, where that does not say, from each sample's json."""
    if samples.groups is not None:
        return samples.groups
    hashes = []
    for index, key in enumerate(samples.keys):
        try:
            info = samples.read_info(index)
        except (ValueError, EOFError):  # a bad sample, which reading it will tell
            info = {}
        hashes.append(int(group_hash(key, info if isinstance(info, dict) else {}), 16))
    return np.array(hashes, dtype=np.uint64)
