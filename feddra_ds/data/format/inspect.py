"""`feddra-ds data inspect`: what a dataset holds, client by client, and whether it is whole."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from feddra_ds.common.console import guarded, next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed
from feddra_ds.data.format.dataset import INDEX_NAME, Dataset, open_dataset
from feddra_ds.data.format.preflight import lost_folders, preflight
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.format.writer import index_folder
from feddra_ds.data.loading.images import BadSample, open_image

_LABELS_SHOWN = 12
_CLIENTS_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data inspect`."""
    add = parser.add_argument
    add("root", type=Path, metavar="ROOT", help="folder of the dataset")
    add("--verify", action="store_true", help="also compare every shard's sha256 with its index.json")
    add(
        "--samples",
        type=int,
        default=200,
        metavar="N",
        help="pairs per client that are read for sizes (default %(default)s)",
    )
    add("--write-index", action="store_true", help="make index.json for folders of WebDataset tars that have none")


@dataclass
class _Seen:
    """What a look at some of a client's samples showed."""

    words: list[int] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)


@guarded
def run(args: argparse.Namespace) -> int:
    """Print the tables and checks. Returns 0 when the dataset is whole, 1 when a check failed, 2 when it cannot be read."""
    if args.samples < 1:
        raise DataError(f"--samples: must be at least 1, got {args.samples}")
    if args.write_index:
        _write_indexes(args.root)
    dataset = open_dataset(args.root)
    clients = [*dataset.client_ids, *dataset.held_out]
    splits = sorted({split for client in clients for split in dataset.splits(client)}, key=_split_order)
    problems = lost_folders(dataset)
    problems += preflight(args.root, clients, batch_size=0, eval_batch_size=0, eval_split=None, verify=False)
    if args.verify:
        shards = sum(len(dataset.shards(client)) for client in dataset.client_ids)
        steps = track(range(shards), shards, "verifying")
        problems += dataset.verify(lambda shard: (next(steps, None), None)[1])

    seen = {} if problems else {client: _look(dataset, client, args.samples) for client in clients}
    rows: list[tuple[object, ...]] = []
    for client in clients:
        own = seen.get(client, _Seen())
        size = sum(shard["bytes"] for _, shard in dataset.shards(client))
        name = f"{client} (held out)" if client in dataset.held_out else client
        counts = [dataset.num_samples(client, split) for split in splits]
        rows.append(
            (name, *counts, len(dataset.shards(client)), _megabytes(size), _range(own.words), _range(own.sides))
        )
    columns = ["client", *splits, "shards", "MB", "words per text", "image side"]
    print_table(f"{args.root}: {dataset.info.get('source', 'no description')}", columns, rows)
    _print_labels(seen)
    _print_checks(dataset, seen, problems, splits, args.verify)
    return 1 if problems else 0


def _write_indexes(root: Path) -> None:
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()] if root.is_dir() else []
    for folder in folders:
        if not (folder / INDEX_NAME).exists() and any(folder.glob("*.tar")):
            counts = index_folder(folder)
            print(f"{folder / INDEX_NAME}: {', '.join(f'{n} {split}' for split, n in counts.items())} samples")


def _look(dataset: Dataset, client: str, limit: int) -> _Seen:
    """Read up to `limit` evenly spaced samples of the client, over its splits."""
    parts = [dataset.samples(client, split) for split in dataset.splits(client)]
    total = sum(len(part) for part in parts)
    seen = _Seen()
    for part in parts:
        number = max(1, min(len(part), round(limit * len(part) / total)))
        for index in np.linspace(0, len(part) - 1, number).astype(int).tolist():
            _look_at(part, index, seen)
    return seen


def _look_at(part: Samples, index: int, seen: _Seen) -> None:
    try:
        text, image, info = part.read_text(index), part.read_image(index), part.read_info(index)
        if image is None:
            raise BadSample("missing_image")
        seen.sides.append(min(open_image(image).size))
        words = (text or b"").decode().split()
        if not words:
            raise BadSample("empty_text")
        seen.words.append(len(words))
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


def _print_labels(seen: dict[str, _Seen]) -> None:
    total: Counter[str] = sum((own.labels for own in seen.values()), Counter())
    if not total:
        return
    shown = [name for name, _ in total.most_common(_LABELS_SHOWN)]
    more = f"; {len(total) - len(shown)} rarer ones not shown" if len(total) > len(shown) else ""
    # Few clients stand side by side; many would not fit, and are summed up.
    groups = (
        {client: [own] for client, own in seen.items()} if len(seen) <= _CLIENTS_SHOWN else {"all": list(seen.values())}
    )
    rows = []
    for name in shown:
        shares = [sum(o.labels[name] for o in own) / max(1, sum(len(o.words) for o in own)) for own in groups.values()]
        rows.append((name, *(f"{share:.0%}" for share in shares)))
    print_table(f"Labels, share of the pairs looked at{more}", ["label", *groups], rows)


def _print_checks(
    dataset: Dataset, seen: dict[str, _Seen], problems: list[str], splits: list[str], verified: bool
) -> None:
    for line in problems:
        print(f"PROBLEM  {line}")
    bad = []
    for client, own in seen.items():
        if own.bad:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(own.bad.items()))
            bad.append(f"{client} ({reasons} among {own.bad.total() + len(own.words)})")
    if bad:
        print(f"note     unreadable among the pairs looked at: {listed(bad)}")
    if not problems:
        print(
            "ok       every shard is there and has its full size"
            + (" and its sha256" if verified else "; --verify checks sha256")
        )
    leaks = _leaks(dataset, splits)
    if leaks:
        print(f"note     {leaks} texts are in train and in another split too; identical reports count as positives")
    smallest = min(dataset.client_ids, key=lambda client: dataset.num_samples(client, "train"), default=None)
    if problems:
        next_step("mend the problems above, or make the dataset again")
        return
    if smallest is not None:
        print(
            f"ok       smallest client {smallest}: data.batch_size can be up to {dataset.num_samples(smallest, 'train')}"
        )
    name = str(dataset.root).rstrip("/").rpartition("/")[2]
    next_step(f"feddra-ds train --config cxr_regions --data.root {dataset.root} --run.output_dir runs/{name}")


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    low, middle, high = np.percentile(values, [5, 50, 95]).round().astype(int)
    return str(middle) if low == high else f"{middle} ({low}–{high})"
