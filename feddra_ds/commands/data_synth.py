"""`feddra-ds data synth`: radiograph-like pictures with reports from five different hospitals and a held-out sixth."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.data.synthetic.hospitals import SynthOptions, synthesize
from feddra_ds.data.synthetic.scene import HELD_OUT, RARE_KIND, SITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data synth`."""
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--num-pairs", type=int, default=2000, metavar="N", help="pairs over the five sites; the held-out site has "
        f"{HELD_OUT.share:.0%}% more (default %(default)s)")  # fmt: skip
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed; the same seed gives the same bytes (default %(default)s)",
    )
    add("--image-size", type=int, default=128, metavar="N", help="side of the pictures in pixels (default %(default)s)")
    add(
        "--val-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="share of each site's pairs for val (default %(default)s)",
    )
    add("--num-workers", type=int, metavar="N", help="processes that draw (default: one per core)")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")


def run(args: argparse.Namespace) -> int:
    """Make the dataset; prints a table of sites. Raises DataError."""
    problems = []
    if args.num_pairs < 20:
        problems.append(f"--num-pairs: must be at least 20, got {args.num_pairs}")
    if not 16 <= args.image_size <= 2048:
        problems.append(f"--image-size: must be from 16 to 2048, got {args.image_size}")
    if not 0 < args.val_fraction < 1:
        problems.append(f"--val-fraction: must be above 0 and below 1, got {args.val_fraction}")
    if problems:
        raise DataError(problems)
    options = SynthOptions(
        num_pairs=args.num_pairs,
        image_size=args.image_size,
        val_fraction=args.val_fraction,
        seed=args.seed,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
    )
    counts = synthesize(args.out, options, track)
    columns = ["site", "train", "val", "held out", "normal", f"{RARE_KIND} (rare)", "report style"]
    kinds = ("train", "val", "test", "normal", RARE_KIND)
    rows = [(site.name, *(counts[site.name][kind] for kind in kinds), site.style) for site in (*SITES, HELD_OUT)]
    print_table(f"{args.out}", columns, rows)
    next_step(
        f"feddra-ds data inspect {args.out}",
        f"feddra-ds train --config quickstart --data.root {args.out} --run.output_dir runs/{Path(args.out).name}",
    )
    return 0
