"""Every byte of a dataset against its indexes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed, printable
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.indexing import KNOWN, Indexer
from feddra_ds.data.format.stream import Raw
from feddra_ds.data.loading.decode import checked
from feddra_ds.data.loading.images import BadSample, open_image, to_rgb
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.threads import in_threads


@dataclass
class Validated:
    """What was read of a client. problems: a line for each shard that is not what its index says. unreadable: by reason, the
    keys of pairs that the index is right about and that cannot be trained on."""

    shards: int = 0
    num_bytes: int = 0
    pairs: int = 0
    problems: list[str] = field(default_factory=list)
    unreadable: dict[str, list[str]] = field(default_factory=dict)


def validate(dataset: Dataset, track: Track = untracked) -> dict[str, Validated]:
    """Read all of all clients, the held-out ones too: each shard's sha256, where the index has one; that the members that the
    index names are those of one sample in the tar, and all of the tar's; that each picture decodes and each text is a report.

    Raises DataError where a client's index cannot be read.
    """
    clients = list(dict.fromkeys([*dataset.client_ids, *dataset.held_out]))
    work = [(client, *one) for client in clients for one in _shards(dataset, client)]
    found = {client: Validated() for client in clients}
    for client, path, shard, rows in track(work, len(work), "validating"):
        _validate_shard(dataset, client, path, shard, rows, found[client])
    return found


def _shards(dataset: Dataset, client: str) -> Iterator[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """(path, what the index says of it, its samples' rows) of each of the client's shards."""
    paths = iter(dataset.shards(client))
    for part in dataset.index(client)["splits"].values():
        rows: list[list[dict[str, Any]]] = [[] for _ in part["shards"]]
        for row in part["samples"]:
            rows[row["shard"]].append(row)
        for own in rows:
            yield (*next(paths), own)


def _validate_shard(
    dataset: Dataset, client: str, path: Path, shard: dict[str, Any], rows: list[dict[str, Any]], found: Validated
) -> None:
    asked, of_index = dataset.data.text_field, dataset.index(client).get("text_field")
    found.shards += 1
    problems = dataset.verify_shard(client, path, shard)
    if not problems:
        try:
            here = dataset.at_hand(client, shard)
            anew = Indexer(of_index if dataset.has_own_index(client) else asked)
            anew.add(shard["file"], here, digest=False)
            (part,) = anew.splits.values()
            problems = _differences(path, rows, part["samples"], shared=dataset.data.client_field is not None)
            _read_pairs(here, rows, asked or of_index, found)
            found.num_bytes += here.stat().st_size
        except DataError as error:
            problems = list(error.problems)
        except OSError as error:
            problems = [f"{path}: cannot be read: {error.strerror}"]
    found.pairs += len(rows)
    found.problems += problems


def _differences(path: Path, rows: list[dict[str, Any]], there: list[dict[str, Any]], *, shared: bool) -> list[str]:
    """What an index's rows of a shard have that is not so in the tar, whose own rows are `there`. shared: others' too."""
    owner = {(suffix, *row[suffix]): number for number, row in enumerate(there) for suffix in KNOWN if suffix in row}
    wrong = []
    for row in rows:
        owners = {owner.get((suffix, *row[suffix])) for suffix in KNOWN if suffix in row}
        number = owners.pop() if len(owners) == 1 else None
        if number is None or not _is_same(row, there[number]):
            wrong.append(printable(row["key"]))
    problems = []
    if wrong:
        problems.append(f"{path}: {len(wrong)} of {len(rows)} samples are not where the index says, or are others: "
                        f"{listed(wrong, 3)}; make the index again")  # fmt: skip
    if len(rows) != len(there) and not shared:
        problems.append(f"{path}: has {len(there)} samples, and the index lists {len(rows)}; make the index again")
    return problems


def _is_same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    key = row["key"]  # an index that has a name twice numbers the second
    named = key == other["key"] or key.startswith(f"{other['key']}#")
    return named and row.get("text_id") == other.get("text_id")


def _read_pairs(path: Path, rows: list[dict[str, Any]], text_field: str | None, found: Validated) -> None:
    """Decode each pair, and keep the names of those that cannot be."""
    with path.open("rb") as file:

        def reason(row: dict[str, Any]) -> str | None:
            members = {
                suffix: os.pread(file.fileno(), row[suffix][1], row[suffix][0]) for suffix in KNOWN if suffix in row
            }
            pair = Raw(row["key"], members, text_field)
            try:
                image, _ = checked(pair.image, pair.text())
                to_rgb(open_image(image))
            except BadSample as error:
                return error.reason
            return None

        for row, why in in_threads(reason, rows):
            if why is not None:
                found.unreadable.setdefault(why, []).append(printable(row["key"]))
