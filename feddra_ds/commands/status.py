"""`feddra-ds status RUN`: where a run in the background stands, read from its files."""

from __future__ import annotations

import argparse
import json
import time

GOOD_STATES = ("running", "starting", "finished")

EXAMPLES = (
    "feddra-ds status runs/mine",
    "feddra-ds status runs/mine --watch 5",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `status`."""
    parser.add_argument("run_dir", metavar="RUN", help="the run's folder (its run.output_dir)")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="show it again every so many seconds until the run ends"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 where the run goes on or is finished, 1 where it stopped before its end."""
    if args.watch is not None and args.watch <= 0:
        raise ValueError(f"--watch: must be more than 0 seconds, got {args.watch:g}")
    from rich.console import Console  # late, as all of this: --help can do without

    from feddra_ds.commands._status_text import show
    from feddra_ds.report.standing import standing
    from feddra_ds.run.files import open_run

    while True:
        files = open_run(args.run_dir)
        report = standing(files)
        if args.json:
            print(json.dumps(report))
        else:
            show(files, report)
        if args.watch is None or report["state"] not in ("running", "starting"):
            return 0 if report["state"] in GOOD_STATES else 1
        time.sleep(args.watch)
        if not args.json and Console().is_terminal:
            Console().clear()
