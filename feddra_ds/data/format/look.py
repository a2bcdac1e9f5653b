"""A look at a dataset: what it holds, client by client, and whether it is whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from feddra_ds.common.text import listed
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.likeness import alike, thumbnail
from feddra_ds.data.format.preflight import lost_folders, preflight
from feddra_ds.data.format.samples import Samples, text_id
from feddra_ds.data.format.text import NO, UNKNOWN, YES
from feddra_ds.data.loading.decode import checked
from feddra_ds.data.loading.images import BadSample, open_image, training_pixels
from feddra_ds.data.progress import Track, untracked


@dataclass
class Seen:
    """What a look at some of a client's pairs showed: the words and tokens of each text, how often each text id came,
    the shorter side of each image in pixels, how many pairs have each label (and each value of one, by its name), and how many
    could not be read for each reason; how long it took to read and decode the others as training does."""

    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    repeated: Counter[int] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    values: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def pairs_per_second(self) -> float | None:
        """How many pairs one process reads and decodes in a second; None where none could be."""
        return len(self.words) / self.seconds if self.words else None


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
    data: DataConfig,
    *,
    samples: int,
    max_pictures: int = 0,
    num_tokens: Callable[[str], int] | None = None,
    track: Track = untracked,
) -> Look:
    """Look at all clients, the held-out ones too. data: how training decodes pictures (image_size, augment), and the share of
    unreadable pairs above which a client is a problem (max_bad_fraction). samples: pairs per client that are read.
    max_pictures: pictures are compared where there are at most so many. num_tokens: counts a text's tokens.

    Raises DataError where a client's index cannot be read.
    """
    clients = list(dict.fromkeys([*dataset.client_ids, *dataset.held_out]))
    splits = sorted({split for client in clients for split in dataset.splits(client)}, key=_split_order)
    problems = lost_folders(dataset)
    problems += preflight(dataset, clients, batch_size=0, eval_batch_size=0, eval_split=None, verify=False)
    own = track([] if problems else clients, len(clients), "looking")
    seen = {client: _look_at_client(dataset, client, samples, data, num_tokens) for client in own}
    _name_labels(list(seen.values()))
    problems += _unreadable(seen, data.max_bad_fraction)
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
        if are_too_many(bad, looked, most):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(own.bad.items()))
            problems.append(f"{client}: {bad} of the {looked} pairs looked at are unreadable ({reasons}), more than "
                            f"data.max_bad_fraction ({most:.0%}) bears with")  # fmt: skip
    return problems


def are_too_many(bad: int, pairs: int, most: float) -> bool:
    """Whether training would exclude a client with so many unreadable pairs; one alone never does it, unless `most` is 0."""
    return bad > (max(1.0, most * pairs) if most > 0 else 0)


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


def _look_at_client(
    dataset: Dataset, client: str, limit: int, data: DataConfig, num_tokens: Callable[[str], int] | None
) -> Seen:
    """Read up to `limit` evenly spaced samples of the client, over its splits."""
    parts = [dataset.samples(client, split) for split in dataset.splits(client)]
    total = sum(len(part) for part in parts)
    seen = Seen()
    for part in parts:
        number = max(1, min(len(part), round(limit * len(part) / total)))
        for index in np.linspace(0, len(part) - 1, number).astype(int).tolist():
            _look_at_pair(part, index, seen, data, num_tokens)
    return seen


def _look_at_pair(
    part: Samples, index: int, seen: Seen, data: DataConfig, num_tokens: Callable[[str], int] | None
) -> None:
    try:
        info, start = part.read_info(index), time.perf_counter()
        image, told = checked(part.read_image(index), part.read_text(index))
        training_pixels(image, data.image_size, data.augment, "look", part.keys[index])
        seen.seconds += time.perf_counter() - start
        seen.sides.append(min(open_image(image).size))
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
        if isinstance(value, bool | int | float):
            value = f"{value:g}"
        if isinstance(value, str):  # a list's parts are labels of their own, as evaluate and probe take them
            seen.values.update({(name, part.strip()) for part in value.split("|")})


def _name_labels(seen: Sequence[Seen]) -> None:
    """`edema` for a label of yes and no, `view=lateral` for each value of others, as evaluate and probe tell them apart."""
    values: dict[str, set[str]] = {}
    for name, value in (one for own in seen for one in own.values):
        values.setdefault(name, set()).add(value.lower())
    plain = {name for name, own in values.items() if own <= YES | NO | UNKNOWN}
    for own in seen:
        for (name, value), count in own.values.items():
            if name not in plain and value.lower() not in UNKNOWN:
                own.labels[f"{name}={value}"] += count
            elif name in plain and value.lower() in YES:
                own.labels[name] += count


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
