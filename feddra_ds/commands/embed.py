"""`feddra-ds embed`: a dataset's pictures and texts as embeddings, in one file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from feddra_ds.commands._model_arguments import add_embedding_arguments, add_model_arguments, call_options, options
from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.text import listed
from feddra_ds.evaluation import finite

EXAMPLES = (
    "feddra-ds embed runs/mine --out mine.safetensors",
    "feddra-ds embed exports/mine --data data/mine --split train --out train.parquet",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `embed`."""
    add_model_arguments(parser)
    add_embedding_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write, FILE.safetensors or FILE.parquet: client, split and key of each pair, the embeddings of its "
        "picture and its text, and a number that equal texts share",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where weights or embeddings are not finite."""
    from feddra_ds.distributed.shares import launched_world
    from feddra_ds.evaluation.embeddings import embed  # late: torch and transformers, which --help can do without

    with launched_world(options(args)) as world:
        result = embed(
            args.model,
            args.out,
            **call_options(args),
            world=world,
        )
    if not world.is_first:
        return 0
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(args.model, result)
    return finite.complain(finite.in_words(result["non_finite"]))


def show(model: str, result: dict[str, Any]) -> None:
    """Pairs of each client, what was left out, and how to read the file."""
    clients = result["clients"]
    rows = [
        [client, about["split"], about["pairs"], sum(about["skipped"].values())] for client, about in clients.items()
    ]
    rows.append(["all", "", *(sum(row[i] for row in rows) for i in (2, 3))])
    print_table(f"{result['model']} on {result['data']}", ["client", "split", "pairs", "unreadable"], rows, total=True)
    if result["without_split"]:
        print(f"no {result['split']} split, so not in it: {listed(result['without_split'])}")
    print(f"wrote {result['embeddings']}, {result['size']} numbers an embedding")
    print()
    name = result["embeddings"]
    is_table = name.endswith(".parquet")
    read = f"pyarrow.parquet.read_table({name!r})" if is_table else f"safetensors.numpy.load_file({name!r})"
    next_step(f"{read}['image']   # in Python", f'feddra-ds search "a text" --model {model} --data {result["data"]}')
