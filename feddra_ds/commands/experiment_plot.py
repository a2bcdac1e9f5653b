"""`feddra-ds experiment plot`: an SVG for each metric, with a point for each seed and each arm's interval."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from feddra_ds.commands._rows_arguments import add_rows_arguments, comparison
from feddra_ds.common.files import write_atomic

EXAMPLES = ("feddra-ds experiment plot heterogeneity --to pictures",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `experiment plot`."""
    add_rows_arguments(parser)
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="folder of the SVGs (default: here)")


def run(args: argparse.Namespace) -> int:
    """Write the pictures and print their paths. Raises ConfigError, DataError and ValueError."""
    from feddra_ds.experiments.plot import draw  # late: --help can do without

    found = comparison(args)
    args.to.mkdir(parents=True, exist_ok=True)
    for metric in found.metrics:
        path = args.to / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', metric)}.svg"
        write_atomic(path, draw(found, metric))
        print(path)
    return 0
