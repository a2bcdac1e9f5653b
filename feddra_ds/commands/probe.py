"""`feddra-ds probe`: how much a linear classifier on frozen image features gets out of 1, 10 and 100 % of the labels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from feddra_ds.commands._model_arguments import add_model_arguments, parse_fractions, positive, split_ids
from feddra_ds.common.console import next_step, print_table
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.verdict import POOLED

EXAMPLES = (
    "feddra-ds probe runs/mine",
    "feddra-ds probe exports/mine --data data/mine --label-key finding --fractions 0.01,0.1,1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `probe`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--label-key",
        action="append",
        metavar="K",
        help="label of the samples' json to predict; may be given several times (default: every label)",
    )
    parser.add_argument(
        "--fractions",
        default="0.01,0.1,1.0",
        metavar="F,F",
        help="shares of the training labels that are used, at least one of each class (default: 0.01,0.1,1.0)",
    )
    parser.add_argument(
        "--features",
        choices=("backbone", "embedding"),
        default="backbone",
        help="backbone: what goes into the image head; embedding: what comes out of it (default: backbone)",
    )
    parser.add_argument("--train-split", default="train", metavar="NAME", help="split to train on (default: train)")
    parser.add_argument("--split", default="val", metavar="NAME", help="split to measure on (default: val)")
    parser.add_argument(
        "--max-pairs",
        type=positive,
        default=20000,
        metavar="N",
        help="most pairs of a client and split (default: 20000)",
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="draws of the labels where not all are used (default: 5)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="C",
        help="inverse of the L2 penalty, scikit-learn's C (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where weights or features are not finite. Raises ValueError for what cannot be probed."""
    fractions = parse_fractions(args.fractions)
    from feddra_ds.evaluation.probe import probe  # late: torch and transformers, which --help can do without

    path = Path(args.model).expanduser()
    result = probe(
        path,
        data=args.data,
        clients=split_ids(args.clients),
        label_keys=args.label_key,
        fractions=fractions,
        features=args.features,
        train_split=args.train_split,
        split=args.split,
        max_pairs=args.max_pairs,
        repeats=args.repeats,
        strength=args.strength,
        device=args.device,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result, path)
    parts = result["non_finite"].items()
    return finite.complain(f"{part}: {line}" for part, found in parts for line in finite.in_words(found))


def show(result: dict[str, Any], model: Path) -> None:
    """A table per label: rows are clients, columns the shares of the labels."""
    for label, about in result["labels"].items():
        clients = [c for c in about["train"] if about["val"][c]]
        heads = [f"{100 * float(f):g} %" for f in about["pooled_probe"]]
        rows: list[list[object]] = []
        for c in clients:
            name = f"{c} (held out)" if c in result["held_out"] else c
            own = [_cell(m.get(c)) for m in about["own_probe"].values()]
            rows.append(
                [name, about["train"][c], about["val"][c], *[_cell(m[c]) for m in about["pooled_probe"].values()], *own]
            )
        total = [sum(about[s][c] for c in clients if c not in result["held_out"]) for s in ("train", "val")]
        rows.append(["all", *total, *[_cell(m[POOLED]) for m in about["pooled_probe"].values()], *[""] * len(heads)])
        used = ", ".join(
            f"{m['labels']} labels at {h}" for m, h in zip(about["pooled_probe"].values(), heads, strict=True)
        )
        columns = ["client", "train", "val", *[f"pooled {h}" for h in heads], *[f"own {h}" for h in heads]]
        print_table(
            f"{label}: AUROC of a linear probe on {result['features']} features ({used})", columns, rows, total=True
        )
        print()
    print("pooled: trained on the labels of all clients that are not held out; own: on the client's own labels alone")
    for label, reason in result["labels_left_out"].items():
        print(f"{label}: left out, {reason}")
    print()
    next_step(
        f"feddra-ds probe {model} --data {result['data']} --features "
        + ("embedding   # after the head" if result["features"] == "backbone" else "backbone   # before the head"),
        f"feddra-ds evaluate {model} --data {result['data']}",
    )


def _cell(measured: dict[str, float] | None) -> str:
    if measured is None:
        return "–"
    spread = f" ± {measured['auroc_sd']:.2f}" if measured["auroc_sd"] else ""
    return f"{measured['auroc']:.3f}{spread}"
