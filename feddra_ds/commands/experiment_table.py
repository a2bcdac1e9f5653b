"""`feddra-ds experiment table`: the arms' means over seeds, and their paired differences to a baseline."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.commands._rows_arguments import add_rows_arguments, comparison
from feddra_ds.common.files import write_atomic
from feddra_ds.experiments.compare import as_csv, markdown

EXAMPLES = (
    "feddra-ds experiment table heterogeneity",
    "feddra-ds experiment table runs/experiments/mine --baseline fedavg --csv arms.csv",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `experiment table`."""
    add_rows_arguments(parser)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there instead of printing them")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a line per arm and metric, with each seed's value"
    )


def run(args: argparse.Namespace) -> int:
    """Print or write the tables. Raises ConfigError, DataError and ValueError."""
    found = comparison(args)
    if args.markdown:
        write_atomic(args.markdown, markdown(found))
    if args.csv:
        write_atomic(args.csv, as_csv(found))
    if not args.markdown and not args.csv:
        print(markdown(found), end="")
    return 0
