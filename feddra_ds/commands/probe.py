"""`feddra-ds probe`: how much a linear classifier on frozen image features gets out of 1, 10 and 100 % of the labels."""

from __future__ import annotations

import argparse
import json
from typing import Any

from feddra_ds.commands.evaluate import add_model_arguments, positive, split_ids
from feddra_ds.common.console import next_step, print_table
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.evaluation.gallery import Gallery, embed_clients, open_split
from feddra_ds.evaluation.models import open_models
from feddra_ds.evaluation.probe import probe_all
from feddra_ds.evaluation.retrieval import POOLED

FEATURES = ("backbone", "embedding")


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
        choices=FEATURES,
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
    """Exit code 0. Raises ValueError for what cannot be probed."""
    fractions = parse_fractions(args.fractions)
    if args.strength <= 0:
        raise ValueError(f"--strength: must be above 0, got {args.strength:g}")
    models = open_models(args.model, args.device)
    if not models.shared:
        raise ValueError(
            f"{models.path}: each client has a model of its own, and a probe needs one; give {models.source}"
        )
    root = models.data_root(args.data)
    dataset = open_split(root, args.split, split_ids(args.clients), models.trained_on(open_dataset(root)))
    parts: dict[str, dict[str, Gallery]] = {}
    for split in (args.train_split, args.split):
        parts[split] = embed_clients(
            models,
            dataset,
            dataset.client_ids,
            split,
            max_pairs=args.max_pairs,
            batch_size=args.batch_size,
            seed=args.seed,
            num_workers=args.num_workers,
            features=args.features == "backbone",
        )
    train, val = parts[args.train_split], parts[args.split]
    trained = models.trained_on(dataset)
    held_out = [c for c in dataset.client_ids if (c in dataset.held_out if trained is None else c not in trained)]
    if not any(c in train for c in dataset.client_ids if c not in held_out):
        raise ValueError(
            f"--train-split: none of {', '.join(dataset.client_ids)} has a {args.train_split} split to train on"
        )
    result: dict[str, Any] = {
        "model": str(models.source),
        "data": root,
        "features": args.features,
        "fractions": fractions,
    }
    result |= probe_all(
        train, val, held_out, args.label_key, fractions, repeats=args.repeats, seed=args.seed, strength=args.strength
    )
    if not result["labels"]:
        reasons = "".join(f"; {label}: {why}" for label, why in result["labels_left_out"].items())
        raise ValueError(f"--label-key: {root} has no label to predict{reasons}")
    if args.json:
        print(json.dumps(result))
    else:
        show(result, str(models.path))
    return 0


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


def show(result: dict[str, Any], model: str) -> None:
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
