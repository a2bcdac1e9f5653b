"""`feddra-ds report RUN`: one self-contained HTML page (no scripts, no network) that is read at a glance."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.common.console import next_step
from feddra_ds.common.files import write_atomic
from feddra_ds.evaluation import finite

EXAMPLES = (
    "feddra-ds report runs/mine",
    "feddra-ds report runs/mine --examples 0 --out report.html   # without pictures and texts",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `report`."""
    parser.add_argument("run_dir", metavar="RUN", help="the run's folder (its run.output_dir); it may still be running")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: RUN/report.html)")
    parser.add_argument(
        "--data", metavar="ROOT", help="folder of shards for the examples (default: the run's data.root)"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=6,
        metavar="N",
        help="example retrievals each way, with pictures and texts of the evaluation split in the page; "
        "0 leaves them out, for a page that may be passed on (default: 6)",
    )
    parser.add_argument(
        "--max-pairs", type=int, default=256, metavar="N", help="most pairs of a client in their gallery (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the examples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where weights or embeddings of the model are not finite, which the page says too. Raises ValueError for
    a folder that is no run."""
    for name in ("examples", "max_pairs"):
        if getattr(args, name) < (0 if name == "examples" else 2):
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(args, name)} is too small")
    from feddra_ds.report.page import examples_of, render  # late: --help can do without
    from feddra_ds.run.files import open_run

    files = open_run(args.run_dir)
    out = args.out or files.path / "report.html"
    if not out.parent.is_dir():
        raise ValueError(f"--out: {out.parent} is not a folder")
    examples = examples_of(files, args.data, args.examples, args.max_pairs, args.seed)
    page = render(files, examples)
    write_atomic(out, page)
    print(f"wrote {out} ({len(page.encode()) / 1e6:.2f} MB)")
    follow = [f"open {out} in a browser"]
    state = files.state()[0]
    if state in ("running", "starting"):
        follow.append(f"feddra-ds report {files.path}   # again, when more rounds are done")
    elif state != "finished":
        follow.append(f"{files.resume_command()}   # goes on with this run")
    if (files.models or files.checkpoints) and not files.evaluation:
        follow.append(f"feddra-ds evaluate {files.path}   # for the report too: held-out clients, intervals, zero-shot")
    next_step(*follow)
    kept = finite.in_words(files.evaluation.get("non_finite") or {})
    for split, found in (files.transfer.get("non_finite") or {}).items():
        kept += [f"{split}: {line}" for line in finite.in_words(found)]
    return finite.complain(dict.fromkeys([*examples["non_finite"], *kept]))
