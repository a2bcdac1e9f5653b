"""`feddra-ds search`: the pictures that a text describes best, as one self-contained HTML page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from feddra_ds.commands._model_arguments import add_embedding_arguments, add_model_arguments, call_options, positive
from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.files import write_atomic
from feddra_ds.evaluation import finite

if TYPE_CHECKING:
    from feddra_ds.evaluation.search import Search

PAGE = Path("search.html")

EXAMPLES = (
    "feddra-ds search 'left effusion' --model runs/mine",
    "feddra-ds search 'left effusion' --model exports/mine --data data/mine --top 50 --out found.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `search`."""
    parser.add_argument("query", metavar="QUERY", help="the text, in quotes: 'left effusion'")
    add_model_arguments(parser, model_option=True)
    add_embedding_arguments(parser)
    parser.add_argument("--top", type=positive, default=12, metavar="N", help="pictures to show (default: 12)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"page to write (default: {PAGE}; with --json, only where it is given)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where weights or embeddings are not finite."""
    out = args.out or (None if args.json else PAGE)
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out.absolute().parent} is not a folder")
    from feddra_ds.evaluation.search import search  # late: torch and transformers, which --help can do without
    from feddra_ds.report.page import render_search

    found = search(
        args.query,
        args.model,
        **call_options(args),
        top=args.top,
    )
    if out is not None:
        write_atomic(out, render_search(found))
    if args.json:
        print(json.dumps(found.report(), allow_nan=False))
    else:
        show(found, out)
    return finite.complain(finite.in_words(found.non_finite))


def show(found: Search, page: Path | None) -> None:
    """The pictures found, with their own texts, and where the page is."""
    rows = [[hit.client, hit.key, f"{hit.score:.3f}", hit.text[:100]] for hit in found.hits]
    title = f"{found.query!r} among the {found.pictures} pictures in {found.split} of {found.data}"
    print_table(title, ["client", "key", "score", "its own text"], rows)
    print(f"wrote {page}")
    print()
    next_step(f"open {page} in a browser")
