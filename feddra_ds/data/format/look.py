"""A look at a dataset: what it holds, client by client, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from feddra_ds.common.text import listed
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.likeness import alike, thumbnail
from feddra_ds.data.format.preflight import lost_folders, preflight
from feddra_ds.data.format.samples import Samples, text_id
from feddra_ds.data.format.text import is_lfs_pointer, no_report
from feddra_ds.data.loading.images import BadSample, open_image
from feddra_ds.data.progress import Track, untracked


@dataclass
class Seen:
    """What a look at some of a client's pairs showed: the words and tokens of each text, how often each text id came,
    the shorter side of each image in pixels, how many pairs have each label, and how many could not be read for each reason."""

    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    repeated: Counter[int] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Look:
    """splits: in the order train, val, test, others. problems: a line each. seen: by client, empty where there are
    problems. leaks: different texts that train shares with another split. patients: those that
    several clients have. pictures: places of pictures that look alike; None where they were not compared."""

    splits: list[str]
    problems: list[str]
    seen: dict[str, Seen]
    leaks: int
    patients: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] | None = None


def look(
    dataset: Dataset,
    *,
    samples: int,
    verify: bool,
    max_bad_fraction: float = 0.05,
    max_pictures: int = 0,
    num_tokens: Callable[[str], int] | None = None,
    track: Track = untracked,
) -> Look:
    """Look at all clients, the held-out ones too. samples: pairs per client that are read. verify: check sha256 too.
    max_bad_fraction: the share of unreadable pairs above which a client is a problem. max_pictures: pictures are compared
    where there are at most so many. num_tokens: counts a text's tokens.

    Raises DataError where a client's index cannot be read.
    """
    clients = [*dataset.client_ids, *dataset.held_out]
    splits = sorted({split for client in clients for split in dataset.splits(client)}, key=_split_order)
    problems = lost_folders(dataset)
    problems += preflight(dataset, clients, batch_size=0, eval_batch_size=0, eval_split=None, verify=False)
    if verify:
        shards = sum(len(dataset.shards(client)) for client in dataset.client_ids)
        steps = track(range(shards), shards, "verifying")
        problems += dataset.verify(progress=lambda shard: (next(steps, None), None)[1])
    seen = {} if problems else {client: _look_at_client(dataset, client, samples, num_tokens) for client in clients}
    problems += _unreadable(seen, max_bad_fraction)
    patients, both = _patients(dataset, clients) if dataset.store is None and seen else ([], [])
    total = sum(dataset.num_samples(client, split) for client in clients for split in dataset.splits(client))
    compared = bool(seen) and dataset.store is None and total <= max_pictures
    pictures = _alike(dataset, clients, total, track) if compared else None
    return Look(splits, [*problems, *patients], seen, _leaks(dataset, splits), both, pictures)


def _alike(dataset: Dataset, clients: list[str], total: int, track: Track) -> list[tuple[str, str]]:
    """Places (client/split/key) of pictures that look alike, a pair for each that looks like an earlier one."""
    parts = [dataset.samples(client, split) for client in clients for split in dataset.splits(client)]
    places, thumbnails = [], []
    pairs = ((own, i) for own in parts for i in range(len(own)))
    for part, index in track(pairs, total, "comparing pictures"):
        try:
            thumbnails.append(thumbnail(part.read_image(index) or b""))
        except (BadSample, EOFError):  # counted among the unreadable
            continue
        places.append(f"{part.client}/{part.split}/{part.keys[index]}")
    return [(places[i], places[j]) for i, j in alike(np.array(thumbnails))]


def _unreadable(seen: dict[str, Seen], most: float) -> list[str]:
    """A line for each client with more unreadable pairs, among those looked at, than training bears with."""
    problems = []
    for client, own in seen.items():
        looked, bad = own.bad.total() + len(own.words), own.bad.total()
        if bad > (max(1.0, most * looked) if most > 0 else 0):  # one bad pair alone does not stop a training either
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(own.bad.items()))
            problems.append(f"{client}: {bad} of the {looked} pairs looked at are unreadable ({reasons}), more than "
                            f"data.max_bad_fraction ({most:.0%}) bears with")  # fmt: skip
    return problems


def _patients(dataset: Dataset, clients: list[str]) -> tuple[list[str], list[str]]:
    """(a line for each client with patients in train and in another split, patients that several clients have)."""
    problems: list[str] = []
    owners: dict[str, set[str]] = {}
    for client in clients:
        sides: dict[str, set[str]] = {}
        for split in dataset.splits(client):
            part = dataset.samples(client, split)
            for index in range(len(part)):
                try:
                    patient = part.read_info(index).get("patient")
                except (ValueError, EOFError, AttributeError):  # counted among the unreadable
                    continue
                if patient not in (None, ""):
                    sides.setdefault(str(patient), set()).add(split)
        split_ones = sorted(patient for patient, own in sides.items() if "train" in own and len(own) > 1)
        if split_ones:
            problems.append(f"{client}: {len(split_ones)} patients are in train and in another split too, which makes "
                            f"evaluation look better than it is, e.g. {listed(split_ones, 3)}; convert with "
                            "--group-column, or let data.val_fraction split")  # fmt: skip
        for patient in sides:
            owners.setdefault(patient, set()).add(client)
    return problems, sorted(patient for patient, own in owners.items() if len(own) > 1)


def _look_at_client(dataset: Dataset, client: str, limit: int, num_tokens: Callable[[str], int] | None) -> Seen:
    """Read up to `limit` evenly spaced samples of the client, over its splits."""
    parts = [dataset.samples(client, split) for split in dataset.splits(client)]
    total = sum(len(part) for part in parts)
    seen = Seen()
    for part in parts:
        number = max(1, min(len(part), round(limit * len(part) / total)))
        for index in np.linspace(0, len(part) - 1, number).astype(int).tolist():
            _look_at_pair(part, index, seen, num_tokens)
    return seen


def _look_at_pair(part: Samples, index: int, seen: Seen, num_tokens: Callable[[str], int] | None) -> None:
    try:
        text, image, info = part.read_text(index), part.read_image(index), part.read_info(index)
        if image is None:
            raise BadSample("missing_image")
        if is_lfs_pointer(image):
            raise BadSample("git_lfs_pointer")
        seen.sides.append(min(open_image(image).size))
        thumbnail(image)  # which decodes it
        told = (text or b"").decode()
        reason = no_report(told)
        if reason is not None:
            raise BadSample(reason)
        seen.words.append(len(told.split()))
        seen.repeated[text_id(told)] += 1
        if num_tokens is not None:
            seen.tokens.append(num_tokens(told))
    except BadSample as error:
        seen.bad[error.reason] += 1
        return
    except (EOFError, ValueError) as error:
        seen.bad["truncated_shard" if isinstance(error, EOFError) else "corrupt_text"] += 1
        return
    labels = info.get("labels")
    for name, value in labels.items() if isinstance(labels, dict) else ():
        if value in (1, True):
            seen.labels[name] += 1
        elif isinstance(value, str):  # a list's parts are labels of their own, as evaluate and probe take them
            seen.labels.update({f"{name}={part.strip()}" for part in value.split("|") if part.strip()})


def _leaks(dataset: Dataset, splits: list[str]) -> int:
    """Different texts that train shares with another split, over all clients."""
    ids: dict[str, set[int]] = {split: set() for split in splits}
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            ids[split].update(dataset.samples(client, split).text_ids.tolist())
    other = set().union(*(ids[split] for split in splits if split != "train"))
    return len(ids.get("train", set()) & other)


def _split_order(split: str) -> tuple[int, str]:
    return ({"train": 0, "val": 1, "test": 2}.get(split, 3), split)
