"""`feddra-ds report RUN`: one self-contained HTML page (no scripts, no network) that is read at a glance."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .charts import NUM_COLOURS, NUM_SHADES
from .data.console import next_step
from .data.shards import open_dataset
from .logs import listed, write_atomic
from .progress import duration
from .report_contents import context, number, percent, size
from .run_files import RunFiles, open_run


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
    """Exit code 0. Raises ValueError for a folder that is no run."""
    for name in ("examples", "max_pairs"):
        if getattr(args, name) < (0 if name == "examples" else 2):
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(args, name)} is too small")
    files = open_run(args.run_dir)
    out = args.out or files.path / "report.html"
    if not out.parent.is_dir():
        raise ValueError(f"--out: {out.parent} is not a folder")
    page = render(files, examples_of(files, args.data, args.examples, args.max_pairs, args.seed))
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
    return 0


def examples_of(files: RunFiles, data: str | None, num: int, max_pairs: int, seed: int) -> dict[str, Any]:
    """{by_image, by_text, split, source}, or {why} where there are none."""
    if num == 0:
        return {"why": "They were left out (--examples 0)."}
    from .examples import (
        retrieval_examples,
    )  # late: torch and transformers, which a page without examples can do without
    from .inference import open_models, open_split

    try:
        models = open_models(files.path)
        split = str(files.get("evaluation.split") or "val")
        root = models.data_root(data)
        dataset = open_split(root, split, None, models.trained_on(open_dataset(root)))
        by_image, by_text = retrieval_examples(models, dataset, split, num_each=num, max_pairs=max_pairs, seed=seed)
    except (ValueError, OSError) as error:
        return {"why": f"There are none: {str(error).splitlines()[0]}"}
    source = models.source.relative_to(files.path) if models.source.is_relative_to(files.path) else models.source
    return {"by_image": by_image, "by_text": by_text, "split": split, "source": str(source), "shared": models.shared}


def render(files: RunFiles, examples: dict[str, Any]) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "number": number, "duration": duration, "size": size, "listed": listed}
    template = resources.files("feddra_ds").joinpath("assets/report.html.j2").read_text(encoding="utf-8")
    values = context(files) | {"examples": examples, "colours": NUM_COLOURS, "shades": NUM_SHADES}
    return environment.from_string(template).render(values)
