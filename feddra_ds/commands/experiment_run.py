"""`feddra-ds experiment run`: train and measure every arm over the seeds of a spec, a row a run; goes on where it was."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from feddra_ds.commands._model_arguments import positive
from feddra_ds.common.console import next_step, track
from feddra_ds.common.text import duration
from feddra_ds.experiments.shipped import names

if TYPE_CHECKING:
    from feddra_ds.experiments.grid import Grid
    from feddra_ds.experiments.rows import Row
    from feddra_ds.experiments.runner import Progress
    from feddra_ds.experiments.spec import Spec

DEEPSPEED = "deepspeed --num_accelerators {ranks} --master_port {{port}} --module feddra_ds train"

EXAMPLES = (
    "feddra-ds experiment run heterogeneity --dry-run",
    "feddra-ds experiment run my_spec.yaml --workers 2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `experiment run`."""
    add = parser.add_argument
    add("spec", metavar="SPEC", help=f"YAML file, or the name of one that comes with the package: {', '.join(names())}")
    add("--seeds", choices=("dev", "test"), default="dev",
        help="which of the spec's seeds: dev seeds choose, test seeds are looked at once (default: dev)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder of rows, runs and data (default: runs/experiments/NAME)")
    add("--arms", nargs="+", metavar="ARM", help="these arms alone, and those that they read (default: all)")
    add("--workers", type=positive, metavar="N", help="runs at a time (default: one per core, or per --ranks cores)")
    add("--data", metavar="DIR", help="dataset to use in the place of the spec's")
    add("--csv", metavar="FILE", help="table to convert in the place of the spec's")
    add("--ranks", type=positive, metavar="K", help="start each run as a launch of K ranks")
    add("--launch", metavar="COMMAND", help="what starts a launch; {ranks} and {port} are filled in, --config comes on top "
        f"(default with --ranks: {DEEPSPEED.replace('{{', '{').replace('}}', '}')})")  # fmt: skip
    add("--again", action="store_true", help="run test seeds although they were run with other arms before")
    add("--keep", action="store_true", help="keep checkpoints and models of the runs")
    add("--dry-run", action="store_true", help="list the runs, and which are done, and stop")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where a run crashed. Raises ConfigError and DataError."""
    from feddra_ds.experiments.grid import expand  # late, as the others: --help can do without
    from feddra_ds.experiments.runner import Options, pending, run_experiment
    from feddra_ds.experiments.spec import load

    spec = load(args.spec)
    out = args.out or spec.default_out
    given = args.data or args.csv
    grid = expand(spec, args.spec, args.seeds, args.arms)
    if args.dry_run:
        _list(spec, grid, out, given)
        return 0
    ranks = args.ranks or 1
    launch = (args.launch or DEEPSPEED).format(ranks=ranks, port="{port}") if args.launch or args.ranks else None
    workers = args.workers or max(1, len(os.sched_getaffinity(0)) // ranks)
    options = Options(out, workers, launch, args.keep, args.again, args.data, args.csv)
    rows = run_experiment(spec, grid, options, _told, track)
    crashed = [run for run in grid.runs if run in pending(grid, rows, given)]
    if crashed:
        print(f"{len(crashed)} of {len(grid.runs)} runs crashed; the same command tries them again. Logs: {out}/runs")
    next_step(f"feddra-ds experiment table {args.spec}" + ("" if args.out is None else f" --out {out}"))
    return 1 if crashed else 0


def _list(spec: Spec, grid: Grid, out: Path, given: str | None) -> None:
    from feddra_ds.experiments.rows import ROWS_NAME, RowsFile
    from feddra_ds.experiments.runner import pending

    todo = {run.id for run in pending(grid, RowsFile(out / ROWS_NAME).rows, given)}
    for run in grid.runs:
        keys = ", ".join(f"{key}={value}" for key, value in run.keys.items())
        print(f"{'to do' if run.id in todo else 'done '}  {run.id}  {keys}")
    print(f"{len(todo)} of {len(grid.runs)} runs of {spec.name} are to do, on {grid.runs[0].kind} seeds")


def _told(row: Row, progress: Progress) -> None:
    """A line for a run that has ended."""
    from feddra_ds.experiments.compare import shown

    if row["status"] == "ok":
        names = ("recall@5", "worst_recall@5", "held_out_recall@5")
        said = ", ".join(f"{name} {shown(name, row['metrics'][name])} %" for name in names if name in row["metrics"])
    else:
        said = f"CRASHED: {row['reason'].splitlines()[0] if row['reason'] else 'no reason'}"
    left = progress.seconds_left()
    about = f"; about {duration(left)} left" if left else ""
    where = f"{progress.done}/{progress.total}"
    print(f"{where} {row['arm']}, seed {row['seed']}: {said}; {duration(row['seconds'])}{about}", flush=True)
