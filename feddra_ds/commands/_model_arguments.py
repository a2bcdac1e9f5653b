"""What `evaluate`, `probe` and `finetune` share; this file is not a command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from feddra_ds.common.files import write_atomic


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the data, and how to run."""
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, its model/, or an exported model")
    parser.add_argument("--data", metavar="ROOT", help="folder of shards (default: the run's data.root)")
    parser.add_argument("--clients", metavar="A,B", help="clients to look at (default: all, the held-out ones too)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pairs a forward (default: 64)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="decoding processes (default: 0)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto, a GPU if any)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of samples and resampling (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


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
