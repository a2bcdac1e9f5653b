"""`feddra-ds data inspect`: what a dataset holds, client by client, and whether it is whole."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import INDEX_NAME, Dataset, open_dataset
from feddra_ds.data.format.look import Look, Seen, look
from feddra_ds.data.format.writer import index_bare_folders
from feddra_ds.data.loading.tokens import load_tokenizer

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
    add(
        "--text-field",
        metavar="F",
        help="field of a sample's json that is its text (its .txt where the json has none), as data.text_field",
    )
    add("--text-length", type=int, default=DataConfig().text_length, metavar="N", help="say how many texts data.text_length N "
        "would cut (default %(default)s)")  # fmt: skip
    add(
        "--tokenizer",
        metavar="T",
        help="count tokens with this tokenizer (model.text.tokenizer; default: the shipped one)",
    )
    add("--max-pictures", type=int, default=20_000, metavar="N", help="look for pictures that are alike where there are at most "
        "N of them; 0 leaves that out (default %(default)s)")  # fmt: skip
    add("--max-bad-fraction", type=float, default=DataConfig().max_bad_fraction, metavar="F", help="share of unreadable pairs "
        "of a client above which this is a problem (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the tables and checks. Returns 0 when the dataset is whole, 1 when a check failed. Raises DataError."""
    if args.samples < 1:
        raise DataError(f"--samples: must be at least 1, got {args.samples}")
    if args.write_index:
        notes: list[str] = []
        for folder, counts in index_bare_folders(args.root, args.text_field, notes):
            print(f"{folder / INDEX_NAME}: {', '.join(f'{n} {split}' for split, n in counts.items())} samples")
        for note in notes:
            print(f"note     {note}")
    dataset = open_dataset(args.root, data=DataConfig(text_field=args.text_field))
    tokenizer = load_tokenizer(args.tokenizer)
    found = look(
        dataset,
        samples=args.samples,
        verify=args.verify,
        max_bad_fraction=args.max_bad_fraction,
        max_pictures=args.max_pictures,
        num_tokens=lambda text: len(tokenizer(text).input_ids),
        track=track,
    )
    _print_clients(args.root, dataset, found)
    _print_labels(found.seen)
    _print_texts(found.seen, args.text_length)
    if not found.problems or found.seen:
        _print_alike(found.pictures, args.max_pictures)
    _print_checks(dataset, found, args.verify)
    return 1 if found.problems else 0


def _print_clients(root: Path, dataset: Dataset, found: Look) -> None:
    rows: list[tuple[object, ...]] = []
    for client in (*dataset.client_ids, *dataset.held_out):
        own = found.seen.get(client, Seen())
        name = f"{client} (held out)" if client in dataset.held_out else client
        counts = [dataset.num_samples(client, split) for split in found.splits]
        shards = dataset.shards(client)
        size = sum(shard["bytes"] for _, shard in shards)
        rows.append(
            (name, *counts, len(shards), _megabytes(size), _range(own.words), _range(own.tokens), _range(own.sides))
        )
    columns = ["client", *found.splits, "shards", "MB", "words per text", "tokens per text", "image side"]
    print_table(f"{root}: {dataset.info.get('source', 'no description')}", columns, rows)


def _print_labels(seen: dict[str, Seen]) -> None:
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


def _print_texts(seen: dict[str, Seen], text_length: int) -> None:
    """What data.text_length would cut, and how many texts come again, among those looked at."""
    cut = {client: sum(n > text_length for n in own.tokens) / max(1, len(own.tokens)) for client, own in seen.items()}
    if any(cut.values()):
        shares = [f"{client} {share:.0%}" for client, share in sorted(cut.items(), key=lambda item: -item[1]) if share]
        print(f"note     data.text_length {text_length} cuts texts: {listed(shares)} of those looked at")
    repeated: Counter[int] = sum((own.repeated for own in seen.values()), Counter())
    again = sum(count for count in repeated.values() if count > 1)
    if again:
        print(f"note     {again} of the {repeated.total()} texts looked at are not the only ones of their wording, the most "
              f"frequent comes {max(repeated.values())} times")  # fmt: skip


def _print_alike(pictures: list[tuple[str, str]] | None, most: int) -> None:
    """Pictures that look alike, those of two clients or two splits by name."""
    if pictures is None:
        print(
            f"note     pictures were not compared: there are more than --max-pictures {most}, or they are not on this disk"
        )
        return
    for part, what in ((0, "at two clients"), (1, "in two splits")):
        apart = [f"{a} and {b}" for a, b in pictures if a.split("/")[part] != b.split("/")[part]]
        if apart:
            print(f"note     {len(apart)} pictures that look alike are {what}: {listed(apart, 3)}")
    if pictures:
        print(f"note     {len(pictures)} pictures look like another one in the data")


def _print_checks(dataset: Dataset, found: Look, verified: bool) -> None:
    for line in found.problems:
        print(f"PROBLEM  {line}")
    bad = []
    for client, own in found.seen.items():
        if own.bad:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(own.bad.items()))
            bad.append(f"{client} ({reasons} among {own.bad.total() + len(own.words)})")
    if bad:
        print(f"note     unreadable among the pairs looked at: {listed(bad)}")
    if not found.problems:
        print(
            "ok       every shard is there and has its full size"
            + (" and its sha256" if verified else "; --verify checks sha256")
        )
    if found.leaks:
        print(
            f"note     {found.leaks} texts are in train and in another split too; identical reports count as positives"
        )
    if found.patients:
        print(
            f"note     {len(found.patients)} patients are at more than one client, by their ids: {listed(found.patients)}"
        )
    smallest = min(dataset.client_ids, key=lambda client: dataset.num_samples(client, "train"), default=None)
    if found.problems:
        next_step("mend the problems above, or make the dataset again")
        return
    if smallest is not None:
        print(
            f"ok       smallest client {smallest}: data.batch_size can be up to {dataset.num_samples(smallest, 'train')}"
        )
    name = str(dataset.root).rstrip("/").rpartition("/")[2]
    next_step(f"feddra-ds train --config cxr_regions --data.root {dataset.root} --run.output_dir runs/{name}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    low, middle, high = np.percentile(values, [5, 50, 95]).round().astype(int)
    return str(middle) if low == high else f"{middle} ({low}–{high})"
