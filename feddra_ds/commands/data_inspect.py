"""`feddra-ds data inspect`: what a dataset holds, client by client, and whether it is whole."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from feddra_ds.commands._data_arguments import KEYS, add_data_arguments, config_of, dataset_of
from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.common.files import write_atomic
from feddra_ds.common.text import listed, printable
from feddra_ds.config.schema import Config, DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.find import INDEX_NAME
from feddra_ds.data.format.look import Look, Seen, look
from feddra_ds.data.format.writer import index_bare_folders
from feddra_ds.report.heat_map import heat_map

_LABELS_SHOWN = 12
_CLIENTS_SHOWN = 8

EXAMPLES = (
    "feddra-ds data inspect data/mine --plot labels.svg",
    "feddra-ds data inspect --config my.yaml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data inspect`."""
    add_data_arguments(parser)
    add = parser.add_argument
    add(
        "--samples",
        type=int,
        default=200,
        metavar="N",
        help="pairs per client that are read for sizes (default %(default)s)",
    )
    add("--write-index", action="store_true", help="make index.json for folders of WebDataset tars that have none")
    add("--text-length", type=int, metavar="N", help="say how many texts data.text_length N would cut (default: the config's, "
        f"else {DataConfig().text_length})")  # fmt: skip
    add("--tokenizer", metavar="T", help="count tokens with it, as model.text.tokenizer (default: the config's, else the "
        "shipped one)")  # fmt: skip
    add("--max-pictures", type=int, default=20_000, metavar="N", help="look for pictures that are alike where there are at most "
        "N of them; 0 leaves that out (default %(default)s)")  # fmt: skip
    add("--plot", metavar="FILE", help="write each label's share at each client as a picture, an SVG")


def run(args: argparse.Namespace) -> int:
    """Print the tables and checks. Returns 0 when the dataset is whole, 1 when a check failed. Raises ConfigError, DataError."""
    if args.samples < 1:
        raise DataError(f"--samples: must be at least 1, got {args.samples}")
    config = config_of(args)
    if args.write_index:
        _write_index(config.data)
    dataset = dataset_of(config)
    found = look(
        dataset,
        config.data,
        samples=args.samples,
        max_pictures=args.max_pictures,
        num_tokens=_token_counter(config),
        track=track,
    )
    _print_clients(dataset, found)
    _print_labels(found.seen, args.plot)
    _print_texts(found.seen, config.data.text_length)
    if not found.problems or found.seen:
        _print_alike(dataset, found.pictures, args.max_pictures)
    _print_checks(dataset, found, args)
    return 1 if found.problems else 0


def _write_index(data: DataConfig) -> None:
    if data.root is None or data.client_field is not None:
        raise DataError(
            "--write-index: is for a folder of one folder per client; `feddra-ds data index` indexes other shards"
        )
    notes: list[str] = []
    for folder, counts in index_bare_folders(Path(data.root), data.text_field, notes):
        said = ", ".join(f"{n} {split}" for split, n in counts.items())
        print(printable(f"{folder / INDEX_NAME}: {said} samples"))
    for note in notes:
        print(f"note     {note}")


def _token_counter(config: Config) -> Callable[[str], int]:
    from feddra_ds.model.build import tokenizer_of  # on demand: it imports torch

    tokenizer = tokenizer_of(config)
    return lambda text: len(tokenizer(text).input_ids)


def _print_clients(dataset: Dataset, found: Look) -> None:
    rows: list[tuple[object, ...]] = []
    for client in (*dataset.client_ids, *dataset.held_out):
        own = found.seen.get(client, Seen())
        name = f"{client} (held out)" if client in dataset.held_out else client
        counts = [dataset.num_samples(client, split) for split in found.splits]
        shards = dataset.shards(client)
        size = sum(shard["bytes"] for _, shard in shards)
        rows.append(
            (
                *(
                    name,
                    *counts,
                    len(shards),
                    _megabytes(size),
                    _range(own.words),
                    _range(own.tokens),
                    _range(own.sides),
                ),
                "–" if own.pairs_per_second is None else f"{own.pairs_per_second:,.0f}",
            )
        )
    columns = ["client", *found.splits, "shards", "MB", "words per text", "tokens per text", "image side", "pairs/s"]
    print_table(f"{dataset.address}: {dataset.info.get('source', 'no description')}", columns, rows)


def _print_labels(seen: dict[str, Seen], plot: str | None) -> None:
    """The share of each label at each client, as a table, and as the picture that --plot asks for."""
    total: Counter[str] = sum((own.labels for own in seen.values()), Counter())
    if not total:
        if plot is not None and seen:
            print("note     --plot: none of the pairs looked at has labels, nothing was drawn")
        return
    names = [name for name, _ in total.most_common()]
    shares = {client: [own.labels[name] / max(1, len(own.words)) for name in names] for client, own in seen.items()}
    told = "share of the pairs looked at"
    if plot is not None:
        write_atomic(Path(plot), heat_map(f"Labels, {told}", names, shares))
        print(f"{plot}: each label's share at each client")
    more = f"; {len(names) - _LABELS_SHOWN} rarer ones not shown" if len(names) > _LABELS_SHOWN else ""
    shown = names[:_LABELS_SHOWN]
    if len(shares) <= _CLIENTS_SHOWN:  # few clients stand side by side, many below each other
        columns = ["label", *shares]
        rows = [(name, *(f"{own[i]:.0%}" for own in shares.values())) for i, name in enumerate(shown)]
    else:
        columns = ["client", *shown]
        rows = [(client, *(f"{share:.0%}" for share in own[: len(shown)])) for client, own in shares.items()]
    print_table(f"Labels, {told}{more}", columns, rows)


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


def _print_alike(dataset: Dataset, pictures: list[tuple[str, str]] | None, most: int) -> None:
    """Pictures that look alike, those of two clients or two splits by name."""
    if dataset.store is not None:
        print("note     patients and pictures were not compared: their shards are not on this disk")
    elif pictures is None:
        print(f"note     pictures were not compared: there are more than --max-pictures {most}")
    if pictures is None:
        return
    for part, what in ((0, "at two clients"), (1, "in two splits")):
        apart = [f"{a} and {b}" for a, b in pictures if a.split("/")[part] != b.split("/")[part]]
        if apart:
            print(f"note     {len(apart)} pictures that look alike are {what}: {listed(apart, 3)}")
    if pictures:
        print(f"note     {len(pictures)} pictures look like another one in the data")


def _print_checks(dataset: Dataset, found: Look, args: argparse.Namespace) -> None:
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
        print("ok       every shard is there and has its full size; `feddra-ds data validate` reads every byte of them")
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
    next_step(_training(args))


def _training(args: argparse.Namespace) -> str:
    """The command that trains on what was looked at."""
    name = Path(args.root or args.config or "shards").stem
    words = ["feddra-ds", "train", "--config", args.config or "cxr_regions"]
    for option in ("root", "clients", "client_field", "text_field"):
        if getattr(args, option) is not None:
            words += [f"--{KEYS[option]}", getattr(args, option)]
    return shlex.join([*words, *([] if args.config else ["--run.output_dir", f"runs/{name}"])])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    low, middle, high = np.percentile(values, [5, 50, 95]).round().astype(int)
    return str(middle) if low == high else f"{middle} ({low}–{high})"
