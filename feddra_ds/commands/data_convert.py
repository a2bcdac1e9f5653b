"""`feddra-ds data convert`: a table with its images, or another source, becomes shards per client."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.common.section import Section
from feddra_ds.common.text import listed
from feddra_ds.data.format.writer import MAX_SHARD_BYTES
from feddra_ds.data.sources import SOURCES, source_class
from feddra_ds.data.sources.base import Columns, Source
from feddra_ds.data.sources.ingest import SKIPPED_NAME, Ingested, IngestOptions, ingest, skipped_lines
from feddra_ds.data.sources.reports import SECTIONS
from feddra_ds.data.sources.table import CsvTable

EXAMPLES = (
    "feddra-ds data convert --csv metadata.csv --image-column image --text-column report --client-column site --out data/mine",
    "feddra-ds data convert --from mimic_cxr --path /archive/mimic-cxr-jpg --out data/mimic --dry-run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data convert`."""
    add = parser.add_argument
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="table with a header line; comma, ; or tab separated; short for --from csv --path FILE",
    )
    add(
        "--from",
        dest="kind",
        metavar="KIND",
        help=f"instead of --csv: {', '.join(SOURCES)}, or package.module:Class, a Source of your own (docs/data.md)",
    )
    add("--path", type=Path, metavar="PATH", help="where that source's data lie")
    add(
        "--source-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of that source (repeatable)",
    )
    add(
        "--image-column", metavar="C", help="column of images or their paths, relative to the table (needed for tables)"
    )
    add("--text-column", metavar="C", help="column of reports or captions (needed for tables)")
    add("--client-column", metavar="C", help="column that says whose pair it is (default: all in one client, `all`)")
    add("--group-column", metavar="C", help="column, such as the patient, whose rows stay on one side of train and val")
    add("--site-column", metavar="C", help="column kept as the pair's site (default: the client column)")
    add("--split-column", metavar="C", help="column of train, val or test, where the data have a split of their own")
    add("--sections", metavar="S,S", help="sections of a report to take, such as findings,impression, or `all` "
        "(default: what the source takes; the whole text of a table)")  # fmt: skip
    add("--max-no-report", type=float, default=0.1, metavar="F", help="share of texts such as nan or ___ above which nothing "
        "is written (default %(default)s)")  # fmt: skip
    add(
        "--dry-run", action="store_true", help="read the rows and some images, say what would be written, write nothing"
    )
    add("--frame", type=int, metavar="N", help="which to take of a DICOM file with several frames, from 0 (default: leave "
        "such files out)")  # fmt: skip
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
    add(
        "--restart",
        action="store_true",
        help="begin anew where a conversion into DIR was cut off (default: go on with it)",
    )


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
        args.split_column,
    )
    options = IngestOptions(
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        image_size=args.image_size,
        repeated_texts=args.repeated_texts,
        seed=args.seed,
        max_shard_bytes=args.max_shard_bytes,
        overwrite=args.overwrite,
        sections=_sections(args.sections),
        max_no_report=args.max_no_report,
        dry_run=args.dry_run,
        frame=args.frame,
        restart=args.restart,
    )
    source = _source(args, columns)
    try:
        done = ingest(source, args.out, options, track)
    except KeyboardInterrupt:
        print("feddra-ds: cut off; the same command goes on behind the shards that are finished", file=sys.stderr)
        raise
    if done.num_kept:
        print(f"{done.num_kept} shards were finished when a conversion into {args.out} was cut off, and were kept")
    _report(args, done, source.unit)
    return 0


def _sections(given: str | None) -> tuple[str, ...] | None:
    """The names in --sections; () for `all`, None where it is not given. Raises DataError for a name that is none."""
    if given is None or given == "all":
        return None if given is None else ()
    names = tuple(name.strip().lower() for name in given.split(",") if name.strip())
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise DataError(f"--sections: unknown {listed(unknown)}; there are: all, {listed(SECTIONS, 50)}")
    return names


def _source(args: argparse.Namespace, columns: Columns) -> Source:
    """What --csv or --from and its options name. Raises ConfigError and DataError."""
    if args.csv is None and args.kind is None:
        raise DataError("--csv: is needed, or --from and --path for another source")
    if args.csv is not None:
        kind: type[Source]
        kind, path, named = CsvTable, args.csv, "--csv"
        problems = [f"--{name}: does not go with --csv" for name in ("from", "path")
                    if getattr(args, "kind" if name == "from" else name) is not None]  # fmt: skip
    else:
        kind, path, named = source_class(args.kind), args.path, "--from"
        problems = ["--path: is needed with --from"] if path is None else []
    if kind.needs_columns:
        named = named if args.csv is not None else f"--from {args.kind}"
        missing = [name for name in ("image", "text") if getattr(args, f"{name}_column") is None]
        problems += [f"--{name}-column: is needed with {named}" for name in missing]
    if problems:
        raise DataError(problems)
    return kind(path, columns, _source_options(kind, args.source_option))


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
    if args.frame is not None and args.frame < 0:
        problems.append(f"--frame: must be at least 0, got {args.frame}")
    if not 0 <= args.max_no_report <= 1:
        problems.append(f"--max-no-report: must be from 0 to 1, got {args.max_no_report}")
    if args.max_shard_bytes < 1 << 16:
        problems.append(f"--max-shard-bytes: must be at least 65536, got {args.max_shard_bytes}")
    if problems:
        raise DataError(problems)


def _report(args: argparse.Namespace, done: Ingested, unit: str) -> None:
    counts, skipped = done.counts, done.skipped
    total = sum(counts.values(), Counter())
    splits = ["train", "val", *(["test"] if total["test"] else [])]
    rows = [
        (client, *(count[split] for split in splits), count["val"] / count.total())
        for client, count in [*sorted(counts.items()), ("all", total)]
    ]
    columns = ["client", *(f"{split} pairs" for split in splits), "val fraction"]
    print_table(f"{args.out}{' (a rehearsal: nothing was written)' if args.dry_run else ''}", columns, rows, total=True)
    if skipped:
        where = "" if args.dry_run else f" ({args.out / SKIPPED_NAME} lists them all)"
        print(f"{len(skipped)} rows {'would be' if args.dry_run else 'were'} left out{where}:")
        print("\n".join(f"  {line}" for line in skipped_lines(skipped, unit)))
    if args.dry_run:
        next_step("the same command without --dry-run")
        return
    if done.scaled:
        _print_scaled(done)
    uneven = []
    for client, count in [] if done.own_split else sorted(counts.items()):
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


def _print_scaled(done: Ingested) -> None:
    shares = [one.clipped for one, _ in done.scaled]
    windowed = sum(one.how == "window" for one, _ in done.scaled)
    most = done.scaled[shares.index(max(shares))][1]
    print(
        f"{len(shares)} grey pictures came to 8 bits, {windowed} by their window and {len(shares) - windowed} by percentiles; "
        f"clipped to black or white: {sum(shares) / len(shares):.1%} of the pixels, at most {max(shares):.1%} ({most})"
    )
