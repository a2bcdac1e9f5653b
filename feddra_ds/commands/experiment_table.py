"""`feddra-ds experiment table`: the arms' means over seeds, and their paired differences to a baseline."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.commands._rows_arguments import add_rows_arguments, comparison
from feddra_ds.common.files import write_atomic

EXAMPLES = (
    "feddra-ds experiment table heterogeneity",
    "feddra-ds experiment table runs/experiments/mine --baseline fedavg --csv arms.csv",
    "feddra-ds experiment table heterogeneity --html heterogeneity.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `experiment table`."""
    add_rows_arguments(parser)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there instead of printing them")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a line per arm and metric, with each seed's value"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write tables and pictures as one page")


def run(args: argparse.Namespace) -> int:
    """Print or write the tables. Raises ConfigError, DataError and ValueError."""
    from feddra_ds.experiments.compare import as_csv, markdown  # late: --help can do without

    found = comparison(args)
    if args.markdown:
        write_atomic(args.markdown, markdown(found))
    if args.csv:
        write_atomic(args.csv, as_csv(found))
    if args.html:
        from feddra_ds.experiments.page import render  # late, as jinja2 is, which only this needs

        source = Path(args.source)
        write_atomic(args.html, render(found, source.parent.name if source.suffix == ".jsonl" else source.stem))
    if not args.markdown and not args.csv and not args.html:
        print(markdown(found), end="")
    return 0
