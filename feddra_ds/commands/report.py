"""`feddra-ds report RUN [RUN …]`: one self-contained HTML page (no scripts, no network) that is read at a glance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from feddra_ds.common.console import next_step
from feddra_ds.common.files import write_atomic
from feddra_ds.evaluation import finite

if TYPE_CHECKING:
    from feddra_ds.run.files import RunFiles

PAGE = Path("runs.html")

EXAMPLES = (
    "feddra-ds report runs/mine",
    "feddra-ds report runs/mine --examples 0 --out report.html   # without pictures and texts",
    "feddra-ds report runs/feddra runs/fedavg   # side by side, in runs.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `report`."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN", help="the run's folder (its run.output_dir); it may still be "
        "running; several are shown side by side, without examples")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: RUN/report.html; of several runs "
        f"{PAGE})")  # fmt: skip
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
    several = len(args.run_dirs) > 1
    if several and args.data is not None:
        raise ValueError("--data: is of the examples, without which several runs are shown; leave it out")
    out = args.out or (PAGE if several else Path(args.run_dirs[0]).expanduser() / "report.html")
    from feddra_ds.run.files import open_run  # late: --help can do without

    runs = [open_run(path) for path in args.run_dirs]
    if not out.parent.is_dir():
        raise ValueError(f"--out: {out.parent} is not a folder")
    return _side_by_side(runs, out) if several else _alone(runs[0], out, args)


def _side_by_side(runs: list[RunFiles], out: Path) -> int:
    from feddra_ds.report.page import render_runs, spoilt_weights

    lines = [f"{files.path}: {line}" for files in runs for line in spoilt_weights(files)]
    page = render_runs(runs, lines)
    write_atomic(out, page)
    print(f"wrote {out} ({len(page.encode()) / 1e6:.2f} MB)")
    next_step(f"open {out} in a browser")
    kept = [f"{files.path}: {line}" for files in runs for line in _kept(files)]
    return finite.complain(dict.fromkeys([*lines, *kept]))


def _kept(files: RunFiles) -> list[str]:
    """What evaluate and finetune kept of what is not finite."""
    lines = finite.in_words(files.evaluation.get("non_finite") or {})
    for split, found in (files.transfer.get("non_finite") or {}).items():
        lines += [f"{split}: {line}" for line in finite.in_words(found)]
    return lines


def _alone(files: RunFiles, out: Path, args: argparse.Namespace) -> int:
    from feddra_ds.report.page import examples_of, render

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
    return finite.complain(dict.fromkeys([*examples["non_finite"], *_kept(files)]))
