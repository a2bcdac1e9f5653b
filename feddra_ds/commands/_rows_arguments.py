"""What `experiment table` and `experiment plot` share; this file is not a command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feddra_ds.experiments.compare import Comparison
    from feddra_ds.experiments.spec import Kind, Spec


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, which metrics, compared to what."""
    add = parser.add_argument
    add("source", metavar="SPEC|ROWS", help="a spec (file or name), whose rows are taken; or a rows.jsonl or its folder, "
        "of which the last row of each run is taken")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder of the spec's rows (default: runs/experiments/NAME)")
    add("--seeds", choices=("dev", "test"), help="which rows (default: test where there are any)")
    add("--baseline", metavar="ARM", help="arm to compare to (default: the spec's)")
    add("--metrics", metavar="A,B", help="metrics to show (default: the spec's)")


def comparison(args: argparse.Namespace) -> Comparison:
    """What the arguments ask for. Raises ConfigError, DataError and ValueError."""
    from feddra_ds.experiments.compare import choose_rows, compare  # late, as the others: --help can do without
    from feddra_ds.experiments.grid import expand
    from feddra_ds.experiments.rows import read_rows
    from feddra_ds.experiments.spec import Spec, load

    source = Path(args.source)
    spec: Spec | None = None
    prints: dict[str, str] | None = None
    order: tuple[str, ...] = ()
    controls: dict[str, str] = {}
    if source.is_dir() or source.suffix == ".jsonl":
        rows = read_rows(source)
    else:
        spec = load(args.source)
        rows = read_rows(args.out or spec.default_out)
        kinds: tuple[Kind, ...] = ("dev", "test")
        grids = [expand(spec, args.source, kind) for kind in kinds if getattr(spec.seeds, kind)]
        order, controls = (grids[0].arms, grids[0].controls) if grids else (order, controls)
        prints = {run.id: run.fingerprint for grid in grids for run in grid.runs}
    chosen = choose_rows(rows, args.seeds, prints)
    if not chosen:
        raise ValueError(f"{args.source}: no row is of these arms and seeds; `feddra-ds experiment run` writes them")
    asked = [name.strip() for name in args.metrics.split(",")] if args.metrics else None
    defaults = spec.metrics if spec is not None else list(Spec.model_fields["metrics"].default)
    metrics = asked or [name for name in defaults if any(name in row.get("metrics", {}) for row in chosen)]
    baseline = args.baseline or controls or (spec.baseline if spec is not None else None)
    return compare(chosen, metrics, baseline, order)
