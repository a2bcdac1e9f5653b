"""`feddra-ds data convert`: a CSV with a folder of images, or a source of the user's own, becomes shards per client."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.common.section import Section
from feddra_ds.common.text import listed
from feddra_ds.data.format.writer import MAX_SHARD_BYTES
from feddra_ds.data.sources import source_class
from feddra_ds.data.sources.base import Columns, Source
from feddra_ds.data.sources.ingest import SKIPPED_NAME, Ingested, IngestOptions, ingest, skipped_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data convert`."""
    add = parser.add_argument
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="table with a header line, UTF-8; comma, ; or tab separated",
    )
    add(
        "--from",
        dest="kind",
        metavar="CLASS",
        help="instead of --csv: package.module:Class, a Source of your own (docs/data.md)",
    )
    add("--path", type=Path, metavar="PATH", help="where that source's data lie")
    add(
        "--source-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of that source (repeatable)",
    )
    add("--image-column", metavar="C", help="column of image paths, relative to the CSV's folder (needed with --csv)")
    add("--text-column", metavar="C", help="column of reports or captions (needed with --csv)")
    add("--client-column", metavar="C", help="column that says whose pair it is (default: all in one client, `all`)")
    add("--group-column", metavar="C", help="column, such as the patient, whose rows stay on one side of train and val")
    add("--site-column", metavar="C", help="column kept as the pair's site (default: the client column)")
    add("--label-columns", metavar="C,C", default="", help="columns kept as labels, separated by commas")
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of each client's pairs for val (default %(default)s)",
    )
    add("--test-fraction", type=float, default=0.0, metavar="F", help="share of each client's pairs for a test split, "
        "which nothing in training looks at (default: none)")  # fmt: skip
    add(
        "--image-size", type=int, metavar="N", help="shrink images to N pixels on the shorter side (default: keep them)"
    )
    add(
        "--repeated-texts",
        action="store_true",
        help="let a text that several groups share be on both sides; by default they stay together, so that "
        "val holds no report seen in training",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the split and of the order in the shards (default %(default)s)",
    )
    add("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, metavar="N", help="bytes per shard (default 256 MiB)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")


def run(args: argparse.Namespace) -> int:
    """Convert; prints a table of clients and the rows left out. Raises DataError."""
    _check_numbers(args)
    labels = tuple(name.strip() for name in args.label_columns.split(",") if name.strip())
    columns = Columns(
        args.image_column or "",
        args.text_column or "",
        args.client_column,
        args.group_column,
        args.site_column,
        labels,
    )
    options = IngestOptions(
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        image_size=args.image_size,
        repeated_texts=args.repeated_texts,
        seed=args.seed,
        max_shard_bytes=args.max_shard_bytes,
        overwrite=args.overwrite,
    )
    _report(args, ingest(_source(args, columns), args.out, options, track))
    return 0


def _source(args: argparse.Namespace, columns: Columns) -> Source:
    """What --csv or --from and its options name. Raises ConfigError and DataError."""
    needed = ["kind", "path"] if args.csv is None else ["csv", "image_column", "text_column"]
    stray = [] if args.csv is None else [name for name in ("kind", "path", "source_option") if getattr(args, name)]
    option = lambda name: "--from" if name == "kind" else f"--{name.replace('_', '-')}"
    if args.csv is None and args.kind is None:
        raise DataError("--csv: is needed, or --from and --path for a source of your own")
    problems = [f"{option(name)}: is needed with {option(needed[0])}" for name in needed if getattr(args, name) is None]
    problems += [f"{option(name)}: does not go with --csv" for name in stray]
    if problems:
        raise DataError(problems)
    if args.csv is not None:
        return source_class("csv")(args.csv, columns)
    kind = source_class(args.kind)
    return kind(args.path, columns, _source_options(kind, args.source_option))


def _source_options(kind: type[Source], given: Sequence[str]) -> Section:
    """The options of a source from KEY=VALUE words. Raises DataError with a line per problem."""
    problems = [f"--source-option: {word} is not KEY=VALUE" for word in given if "=" not in word]
    values = {key: value for key, _, value in (word.partition("=") for word in given if "=" in word)}
    try:
        options = kind.Options.model_validate(values)
    except ValidationError as error:
        there = ", ".join(kind.Options.model_fields) or "none"
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            unknown = item["type"] == "extra_forbidden"
            text = f"unknown; there are: {there}" if unknown else f"{item['msg']} (got {item['input']!r})"
            problems.append(f"--source-option {key}: {text.replace('Input should be', 'must be', 1)}")
    if problems:
        raise DataError(problems)
    return options


def _check_numbers(args: argparse.Namespace) -> None:
    problems = []
    if not 0 <= args.val_fraction < 1:
        problems.append(f"--val-fraction: must be at least 0 and below 1, got {args.val_fraction}")
    elif not 0 <= args.test_fraction < 1 - args.val_fraction:
        problems.append(f"--test-fraction: must be at least 0 and leave something to train on beside --val-fraction, got "
                        f"{args.test_fraction}")  # fmt: skip
    if args.image_size is not None and args.image_size < 8:
        problems.append(f"--image-size: must be at least 8, got {args.image_size}")
    if args.max_shard_bytes < 1 << 16:
        problems.append(f"--max-shard-bytes: must be at least 65536, got {args.max_shard_bytes}")
    if problems:
        raise DataError(problems)


def _report(args: argparse.Namespace, done: Ingested) -> None:
    counts, skipped = done.counts, done.skipped
    total = sum(counts.values(), Counter())
    splits = ["train", "val", *(["test"] if total["test"] else [])]
    rows = [
        (client, *(count[split] for split in splits), count["val"] / count.total())
        for client, count in [*sorted(counts.items()), ("all", total)]
    ]
    columns = ["client", *(f"{split} pairs" for split in splits), "val fraction"]
    print_table(f"{args.out}", columns, rows, total=True)
    if skipped:
        print(f"{len(skipped)} rows were left out ({args.out / SKIPPED_NAME} lists them all):")
        print("\n".join(f"  {line}" for line in skipped_lines(skipped)))
    uneven = []
    for client, count in sorted(counts.items()):
        wanted = args.val_fraction * count.total()
        if abs(count["val"] - wanted) > max(1.0, 0.05 * count.total()):
            uneven.append(f"{client} ({count['val']} of {count.total()} pairs are val, {wanted:.0f} were wanted)")
    if uneven:
        loosen = "" if args.repeated_texts else "; --repeated-texts loosens it"
        print(f"patients, texts and pictures that must stay together allow no nearer split of {listed(uneven)}{loosen}")
    next_step(
        f"feddra-ds data inspect {args.out}",
        f"feddra-ds train --config cxr_regions --data.root {args.out} --run.output_dir runs/{Path(args.out).name}",
    )
