"""`feddra-ds data synth`: radiograph-like pictures with reports from five different hospitals and a held-out sixth."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.data.synthetic.scene import HELD_OUT, RARE_KIND, SITES

EXAMPLES = (
    "feddra-ds data synth --out data/synthetic --num-pairs 200 --image-size 64",
    "feddra-ds data synth --out data/shifted --label-shift 0.3 --scanner-shift 0.5 --sizes even",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data synth`."""
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--num-pairs", type=int, default=2000, metavar="N", help="train and val pairs over the five sites; the held-out "
        f"site has {HELD_OUT.share:.0%}% more (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S",
        help="seed; the same seed gives the same bytes (default %(default)s)")  # fmt: skip
    add("--image-size", type=int, default=128, metavar="N", help="side of the pictures in pixels (default %(default)s)")
    add("--val-fraction", type=float, default=0.2, metavar="F",
        help="share of each site's pairs for val (default %(default)s)")  # fmt: skip
    add("--test-pairs", type=int, metavar="N", help="a test split of N pairs at each of the six sites, of patients of "
        "their own, on top of --num-pairs (default: the held-out site's pairs alone are test)")  # fmt: skip
    add("--num-workers", type=int, metavar="N", help="processes that draw (default: one per core)")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")
    _add_heterogeneity(parser.add_argument_group("how the sites differ"))


def _add_heterogeneity(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--label-shift", type=_label_shift, metavar="A", help="Dirichlet α of each site's mix of findings around the "
        "held-out site's; none: one mix at all sites (default: five mixes of their own)")  # fmt: skip
    add("--style-shift", choices=("on", "off"), default="on",
        help="off: all sites write in all styles (default: each in its own)")  # fmt: skip
    add("--scanner-shift", type=_strength, default=1.0, metavar="on|off|F",
        help="off: one scanner for all; a number from 0 to 1 lies between (default: on)")  # fmt: skip
    add("--sizes", type=_sizes, default="default", metavar="even|A,B,C,D,E",
        help=f"shares of the sites ({', '.join(site.name for site in SITES)}; default: "
        f"{','.join(f'{site.share:g}' for site in SITES)})")  # fmt: skip
    add("--label-noise", nargs="+", action="append", default=[], metavar=("F", "SITE"), help="share of the train and val "
        "pairs, of one site or of all, whose report is of another study; may be repeated")  # fmt: skip
    add("--hard-site", nargs=2, action="append", default=[], metavar=("SITE", "F"), help="share of the site's pairs, test "
        "included, whose report says nothing of the picture: hard in itself, nothing to learn; may be repeated")  # fmt: skip


def _label_shift(text: str) -> float:
    return math.inf if text in ("none", "inf") else float(text)


def _strength(text: str) -> float:
    return {"on": 1.0, "off": 0.0}[text] if text in ("on", "off") else float(text)


def _sizes(text: str) -> str | tuple[float, ...]:
    return text if text in ("default", "even") else tuple(float(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Make the dataset; prints a table of sites. Raises DataError."""
    from feddra_ds.data.synthetic.hospitals import SynthOptions, synthesize  # late: --help can do without
    from feddra_ds.data.synthetic.sites import Heterogeneity

    heterogeneity = Heterogeneity(
        label_shift=args.label_shift,
        style_shift=args.style_shift == "on",
        scanner_shift=args.scanner_shift,
        sizes=args.sizes,
        label_noise=_label_noise(args.label_noise),
        hard_sites={site: _share("--hard-site", share) for site, share in args.hard_site},
    )
    options = SynthOptions(
        num_pairs=args.num_pairs,
        image_size=args.image_size,
        val_fraction=args.val_fraction,
        test_pairs=args.test_pairs,
        heterogeneity=heterogeneity,
        seed=args.seed,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
    )
    counts = synthesize(args.out, options, track)
    columns = ["site", "train", "val", "held out" if args.test_pairs is None else "test", "normal",
               f"{RARE_KIND} (rare)", "report style"]  # fmt: skip
    kinds = ("train", "val", "test", "normal", RARE_KIND)
    styles = {site.name: site.style if heterogeneity.style_shift else HELD_OUT.style for site in (*SITES, HELD_OUT)}
    rows = [(name, *(counts[name][kind] for kind in kinds), style) for name, style in styles.items()]
    print_table(f"{args.out}", columns, rows)
    next_step(
        f"feddra-ds data inspect {args.out}",
        f"feddra-ds train --config quickstart --data.root {args.out} --run.output_dir runs/{Path(args.out).name}",
    )
    return 0


def _label_noise(given: list[list[str]]) -> dict[str, float]:
    """Site → share, of `--label-noise F [SITE]`, the last of a site counts. Raises DataError."""
    out: dict[str, float] = {}
    for share, *sites in given:
        if len(sites) > 1:
            raise DataError(f"--label-noise: takes a share and at most one site, got {share} {' '.join(sites)}")
        out |= dict.fromkeys(sites or [site.name for site in SITES], _share("--label-noise", share))
    return out


def _share(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{option}: must give a share from 0 to 1, got {text}") from None
