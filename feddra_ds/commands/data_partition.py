"""`feddra-ds data partition`: deals a dataset out over N clients by a Dirichlet draw over labels (the paper's split)."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.data.sources.partition import PartitionOptions, partition
from feddra_ds.data.sources.shift import Shift

_SHOWN = 15  # labels

EXAMPLES = (
    "feddra-ds data partition data/mine --out data/dealt --num-clients 3 --label finding --alpha 0.5",
    "feddra-ds data partition data/mine --out data/control --keep-clients --shuffle-texts",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data partition`."""
    add = parser.add_argument
    add("root", type=Path, metavar="ROOT", help="folder of the dataset to deal out; its splits stay as they are")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--num-clients", type=int, default=5, metavar="N", help="clients to make, client0 … (default %(default)s)")
    add("--label", metavar="NAME", help="label to deal by, or `site` (default: the only label, or the labels together)")
    add("--alpha", type=float, default=0.5, metavar="A", help="Dirichlet concentration: small = very different clients, "
        "large = alike (default %(default)s)")  # fmt: skip
    add(
        "--min-pairs",
        type=int,
        default=1,
        metavar="N",
        help="fewest train pairs per client; draws again until it holds",
    )
    add("--keep-clients", action="store_true", help="leave the clients as they are (with --shuffle-texts)")
    add("--shuffle-texts", action="store_true", help="a control: deal each client's train texts to its images at random; "
        "what is learned from this must be chance")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="seed of the draw (default %(default)s)")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")


def _print_shift(shift: Shift, args: argparse.Namespace) -> None:
    """A table of the labels' shares over the clients, and one line for how different the clients have become."""
    rows = [(one.label, one.pooled, one.lowest, one.highest) for one in shift.prevalences]
    print_table("shares of the train pairs", ["label", "all", "lowest client", "highest client"], rows[:_SHOWN])
    if len(rows) > _SHOWN:
        print(f"… and {len(rows) - _SHOWN} more, which differ less")
    print(
        f"shift at --alpha {args.alpha:g}: clients' {args.label or 'labels together'} differ from the pooled by "
        f"{shift.distance:.2f} in the mean (total variation, 0 to 1; at random {shift.by_chance:.2f}), most "
        f"{shift.client} by {shift.largest:.2f}"
    )


def run(args: argparse.Namespace) -> int:
    """Deal out; prints tables of clients and of their labels. Raises DataError."""
    problems = []
    if args.num_clients < 1:
        problems.append(f"--num-clients: must be at least 1, got {args.num_clients}")
    if not args.alpha > 0:
        problems.append(f"--alpha: must be above 0, got {args.alpha}")
    if args.keep_clients and not args.shuffle_texts:
        problems.append("--keep-clients: with nothing to change would copy the dataset; it goes with --shuffle-texts")
    if args.out.resolve() == args.root.resolve():
        problems.append("--out: must be another folder than ROOT")
    if problems:
        raise DataError(problems)
    options = PartitionOptions(
        num_clients=args.num_clients,
        label=args.label,
        alpha=args.alpha,
        min_pairs=args.min_pairs,
        keep_clients=args.keep_clients,
        shuffle_texts=args.shuffle_texts,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    dealt = partition(args.root, args.out, options, track)
    counts = dealt.counts
    splits = sorted({split for count in counts.values() for split in count}, key=["train", "val", "test"].index)
    print_table(f"{args.out}", ["client", *splits], [(c, *(n[s] for s in splits)) for c, n in sorted(counts.items())])
    if dealt.shift is not None:
        _print_shift(dealt.shift, args)
    next_step(f"feddra-ds data inspect {args.out}",
              f"feddra-ds train --config cxr_regions --data.root {args.out} "
              f"--run.output_dir runs/{Path(args.out).name}")  # fmt: skip
    return 0
