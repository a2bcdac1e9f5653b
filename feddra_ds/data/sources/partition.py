"""Deals a dataset out over N clients by a Dirichlet draw over labels, as the paper splits its data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.format.writer import MAX_SHARD_BYTES, DatasetWriter, safe_name
from feddra_ds.data.loading.order import permutation, seeded
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.sources.base import nearest
from feddra_ds.data.sources.shift import Shift, measure_shift

_TRIES = 100


@dataclass(frozen=True)
class PartitionOptions:
    """label: what to deal by, `site` for the site, None for the only label or all labels together. alpha: Dirichlet
    concentration. min_pairs: fewest train pairs per client. keep_clients: leave the clients as they are.
    shuffle_texts: deal each client's train texts to its images at random."""

    num_clients: int = 5
    label: str | None = None
    alpha: float = 0.5
    min_pairs: int = 1
    keep_clients: bool = False
    shuffle_texts: bool = False
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class Dealt:
    """counts: {client: {split: pairs}}. shift: of the train pairs; None where the clients were kept."""

    counts: dict[str, Counter[str]]
    shift: Shift | None


@dataclass(frozen=True)
class _Pair:
    part: Samples
    index: int
    info: dict[str, Any]


def partition(root: Path, out: Path, options: PartitionOptions, track: Track = untracked) -> Dealt:
    """Deal the dataset at `root` out into one at `out`. Raises DataError."""
    dataset = open_dataset(root)
    pairs = _read(dataset, dataset.client_ids)
    owners = [pair.part.client for pair in pairs] if options.keep_clients else _deal(pairs, dataset, options)
    texts = _shuffled(pairs, owners, options.seed) if options.shuffle_texts else list(range(len(pairs)))
    held_out = _read(dataset, dataset.held_out) if options.keep_clients else []

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with DatasetWriter(out, max_shard_bytes=MAX_SHARD_BYTES, overwrite=options.overwrite) as writer:
        kept = {k: v for k, v in dataset.info.items() if k in ("label_names", "label_columns", "image_size", "sites")}
        writer.info |= {"source": _describe(options, dataset), **kept}
        writer.held_out += dataset.held_out if held_out else []
        everything = [(pair, owner, pairs[t]) for pair, owner, t in zip(pairs, owners, texts, strict=True)]
        everything += [(pair, pair.part.client, pair) for pair in held_out]
        for pair, owner, told in track(everything, len(everything), "writing shards"):
            _copy(writer, pair, owner, told)
            counts[owner][pair.part.split] += 1
    return Dealt(counts, None if options.keep_clients else _shift(pairs, owners, options))


def deal(units: Sequence[tuple[str, int]], num_clients: int, alpha: float, min_pairs: int, seed: int) -> np.ndarray:
    """Which client gets each unit: (units,) int64. units: (label, train pairs) each.

    For every label a Dirichlet(alpha) draw over the clients gives the share of the label's pairs that each is due; the
    label's units, in a seeded order, are then dealt to whoever is furthest behind its due. Drawn again until every
    client has `min_pairs` train pairs. Raises DataError when that does not happen.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    for number, (label, _) in enumerate(units):
        by_label[label].append(number)
    best = 0
    for attempt in range(_TRIES):
        key = np.frombuffer(seeded("dirichlet", seed, attempt)[:16], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        owner = np.zeros(len(units), dtype=np.int64)
        sizes = np.zeros(num_clients, dtype=np.int64)
        for label in sorted(by_label):
            members = by_label[label]
            weight = np.array([max(1, units[m][1]) for m in members])
            due = rng.dirichlet(np.full(num_clients, alpha)) * weight.sum()
            for m in permutation(len(members), "deal", seed, attempt, label).tolist():
                client = int(np.argmax(due))
                owner[members[m]] = client
                due[client] -= weight[m]
                sizes[client] += units[members[m]][1]
        if sizes.min() >= min_pairs:
            return owner
        best = max(best, int(sizes.min()))
    raise DataError(
        f"--min-pairs: no draw of {_TRIES} gives every client {min_pairs} train pairs (the best gave {best}); "
        "raise --alpha, or lower --min-pairs or --num-clients"
    )


def _read(dataset: Dataset, clients: Sequence[str]) -> list[_Pair]:
    parts = [dataset.samples(client, split) for client in clients for split in dataset.splits(client)]
    return [_Pair(part, i, part.read_info(i)) for part in parts for i in range(len(part))]


def _deal(pairs: list[_Pair], dataset: Dataset, options: PartitionOptions) -> list[str]:
    """The new client of each pair. A patient's pairs go to one client, by the patient's most frequent label."""
    labels = [_label(pair.info, options.label) for pair in pairs]
    if all(label is None for label in labels):
        names = sorted({name for pair in pairs for name in pair.info.get("labels") or {}} | {"site"})
        near = nearest(options.label or "", names) or "."
        raise DataError(
            f"--label: no pair under {dataset.root} has {options.label or 'labels'}{near} There are: {', '.join(names)}"
        )
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        patient = pair.info.get("patient")
        members[("patient", f"{patient}") if patient else ("pair", str(number))].append(number)
    units = []
    for own in members.values():
        label = Counter(labels[i] or "none" for i in own).most_common(1)[0][0]
        units.append((label, sum(pairs[i].part.split == "train" for i in own)))
    owner = deal(units, options.num_clients, options.alpha, options.min_pairs, options.seed)
    width = len(str(options.num_clients - 1))
    out = [""] * len(pairs)
    for client, own in zip(owner.tolist(), members.values(), strict=True):
        for i in own:
            out[i] = f"client{client:0{width}d}"
    return out


def _shift(pairs: list[_Pair], owners: list[str], options: PartitionOptions) -> Shift:
    train = [i for i, pair in enumerate(pairs) if pair.part.split == "train"]
    infos = [pairs[i].info for i in train]
    dealt_by = [_label(info, options.label) or "none" for info in infos]
    told = [_told(info) for info in infos]
    if options.label is not None:
        prefix = f"{options.label}="
        told = [
            [f"{prefix}{label}"] if options.label == "site" else [one for one in own if one.startswith(prefix)]
            for label, own in zip(dealt_by, told, strict=True)
        ]
    return measure_shift([owners[i] for i in train], dealt_by, told, options.seed)


def _told(info: dict[str, Any]) -> list[str]:
    """`name=value` of each label that a pair has, without those that say no."""
    labels = info.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    return [f"{name}={value}" for name, value in sorted(labels.items()) if value not in (None, 0, False, "")]


def _label(info: dict[str, Any], name: str | None) -> str | None:
    labels = info.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    if name == "site":
        return info.get("site")
    if name is not None:
        value = labels.get(name)
        return None if value is None else str(value)
    return "|".join(_told(info)) if labels else None


def _shuffled(pairs: list[_Pair], owners: list[str], seed: int) -> list[int]:
    """For each pair the one whose text it gets: another train pair of the same client; itself outside of train."""
    out = list(range(len(pairs)))
    for client in sorted(set(owners)):
        own = [i for i, owner in enumerate(owners) if owner == client and pairs[i].part.split == "train"]
        order = permutation(len(own), "shuffle", seed, client).tolist()
        for one, following in zip(order, order[1:] + order[:1], strict=True):  # one cycle, so that none keeps its own
            out[own[one]] = own[following]
    return out


def _copy(writer: DatasetWriter, pair: _Pair, owner: str, told: _Pair) -> None:
    part, index = pair.part, pair.index
    image, text = part.read_image(index), told.part.read_text(told.index)
    suffix = "png" if image is not None and image.startswith(b"\x89PNG") else "jpg"
    key = safe_name(f"{part.client}-{part.keys[index]}")
    writer.add(owner, part.split, key, image=image, suffix=suffix,
               text=None if text is None else text.decode(errors="replace"), info=pair.info)  # fmt: skip


def _describe(options: PartitionOptions, dataset: Dataset) -> str:
    how = []
    if not options.keep_clients:
        how.append(f"{options.num_clients} clients, Dirichlet {options.alpha} over {options.label or 'all labels'}")
    how += ["texts shuffled (a control)"] if options.shuffle_texts else []
    return f"{dataset.info.get('source', dataset.root.name)}; {', '.join(how)}, seed {options.seed}"
