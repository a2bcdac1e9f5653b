"""Arguments that commands on trained models share; this file is not a command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from feddra_ds.common.files import write_atomic


def add_model_arguments(parser: argparse.ArgumentParser, *, model_option: bool = False) -> None:
    """The model, the data, and how to run. model_option: the model is --model instead of the first word."""
    about = "a run's folder, its model/, or an exported model"
    if model_option:
        parser.add_argument("--model", required=True, metavar="RUN_OR_MODEL", help=about)
    else:
        parser.add_argument("model", metavar="RUN_OR_MODEL", help=about)
    parser.add_argument("--data", metavar="ROOT", help="folder of shards (default: the run's data.root)")
    parser.add_argument("--clients", metavar="A,B", help="clients to look at (default: all, the held-out ones too)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pairs a forward (default: 64)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="decoding processes (default: 0)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto, a GPU if any)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of samples and resampling (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pairs `embed` and `search` embed, and by which of a run's models."""
    parser.add_argument("--split", default="val", metavar="NAME", help="split to embed (default: val)")
    parser.add_argument("--max-pairs", type=positive, metavar="N", help="most pairs of a client (default: all)")
    parser.add_argument(
        "--ema", action="store_true", help="take the run's average over rounds (aggregate.ema) in place of its model"
    )


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `evaluate`, `embed` and `search` are all called with, from their common options."""
    names = ("data", "split", "device", "max_pairs", "batch_size", "num_workers", "seed", "ema")
    return {name: getattr(args, name) for name in names} | {"clients": split_ids(args.clients)}


def split_ids(text: str | None, option: str = "--clients") -> list[str] | None:
    """`a,b` as a list; None for None. Raises ValueError, which names the option, for an empty one."""
    if text is None:
        return None
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if not ids:
        raise ValueError(f"{option}: is empty; leave it out to take all of them")
    return ids


def parse_fractions(text: str) -> list[float]:
    """`0.01,0.1,1.0` as floats. Raises ValueError for what is no share."""
    out = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise ValueError(f"--fractions: {part.strip()!r} is no number; give shares such as 0.01,0.1,1.0") from None
        if not 0 < value <= 1:
            raise ValueError(f"--fractions: {value:g} is no share; each must be above 0 and at most 1")
        out.append(value)
    return sorted(set(out))


def keep_for_report(path: Path, result: dict[str, Any]) -> Path | None:
    """Write the result where `report` looks for it. Returns the path, or None where it cannot be written."""
    try:
        write_atomic(path, json.dumps(result, allow_nan=False) + "\n")
    except OSError as error:
        print(
            f"feddra-ds: {path} cannot be written ({error.strerror}), so the report will not show this", file=sys.stderr
        )
        return None
    return path


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for, as JSON values: what all ranks of a launch must have in common."""
    known = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {name: value for name, value in known.items() if value is None or isinstance(value, (str, int, float))}
