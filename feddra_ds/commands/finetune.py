"""`feddra-ds finetune`: the transfer table, fine-tuning on 1, 10 and 100 % of the labels, through accelerate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from feddra_ds.commands._model_arguments import (
    add_model_arguments,
    keep_for_report,
    parse_fractions,
    positive,
    split_ids,
)
from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.text import decimals, listed
from feddra_ds.distributed.launch import Launch
from feddra_ds.evaluation import finite

EXAMPLES = (
    "feddra-ds finetune runs/mine",
    "feddra-ds finetune exports/mine --data data/mine --label-key finding --modes full --fractions 0.1,1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `finetune`."""
    parser.description = (
        f"{parser.description} Of a run as a whole (no --clients) it keeps the result in RUN/finetune.json, which "
        "`feddra-ds report RUN` shows. On several processes: accelerate launch --multi_gpu --num_processes 2 -m feddra_ds "
        "finetune RUN (on CPUs too, with --device cpu)."
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--batch-size", type=positive, default=64, metavar="N", help="pairs a step, over all processes (default: 64)")
    add(
        "--label-key",
        action="append",
        metavar="K",
        help="label of the samples' json to predict; of several, one classifier predicts all (default: every label)",
    )
    add(
        "--modes",
        default="linear,full",
        metavar="A,B",
        help="linear: a layer on frozen features; full: from there the whole image encoder (default: linear,full)",
    )
    add(
        "--fractions",
        default="0.01,0.1,1.0",
        metavar="F,F",
        help="shares of the training labels that are used, at least one of each class (default: 0.01,0.1,1.0)",
    )
    add(
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="draws of the labels, by --seed and the numbers after it (default: 3)",
    )
    add("--train-split", default="train", metavar="NAME", help="split to train on (default: train)")
    add("--val-split", default="val", metavar="NAME", help="split that says when to stop (default: val)")
    add(
        "--split",
        metavar="NAME",
        help="split to measure on (default: test where a client that was trained on has it, else --val-split)",
    )
    add(
        "--max-pairs",
        type=positive,
        default=20000,
        metavar="N",
        help="most pairs of a client and split (default: 20000)",
    )
    add("--epochs", type=positive, default=50, metavar="N", help="most passes over the labels (default: 50)")
    add(
        "--patience",
        type=positive,
        default=10,
        metavar="N",
        help="passes (of ten steps or more) without a better loss on --val-split that end it (default: 10)",
    )
    add("--lr", type=float, default=1e-4, metavar="LR", help="learning rate of full fine-tuning (default: 1e-4)")
    add("--weight-decay", type=float, default=1e-2, metavar="W", help="and its weight decay (default: 1e-2)")
    add(
        "--strength",
        type=float,
        default=1.0,
        metavar="C",
        help="inverse of the L2 penalty of the layer on frozen features, scikit-learn's C (default: 1)",
    )
    add(
        "--class-weights",
        choices=("balanced", "none"),
        default="balanced",
        help="balanced: the classes of a label count alike, however rare they are (default: balanced)",
    )
    add(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="of the encoder's arithmetic (default: what accelerate launch or its config says)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where weights or features are not finite. The first process alone prints and writes. Raises ValueError
    for what cannot be fine-tuned."""
    fractions = parse_fractions(args.fractions)
    modes = split_ids(args.modes, "--modes") or ()
    from feddra_ds.evaluation.finetune import finetune  # late: torch, transformers and accelerate
    from feddra_ds.run.files import TRANSFER_NAME, is_run

    path = Path(args.model).expanduser()
    result = finetune(
        path,
        data=args.data,
        clients=split_ids(args.clients),
        label_keys=args.label_key,
        modes=modes,
        fractions=fractions,
        repeats=args.repeats,
        train_split=args.train_split,
        val_split=args.val_split,
        split=args.split,
        max_pairs=args.max_pairs,
        epochs=args.epochs,
        patience=args.patience,
        lr=args.lr,
        strength=args.strength,
        weight_decay=args.weight_decay,
        class_weights=args.class_weights,
        mixed_precision=args.mixed_precision,
        device=args.device,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    if Launch.from_environment().rank:
        return int(bool(result["non_finite"]))
    kept = keep_for_report(path / TRANSFER_NAME, result) if is_run(path) and args.clients is None else None
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result, path, kept)
    parts = result["non_finite"].items()
    return finite.complain(f"{part}: {line}" for part, found in parts for line in finite.in_words(found))


def show(result: dict[str, Any], model: Path, kept: Path | None) -> None:
    """The transfer table: rows are labels and clients, columns the shares of the labels, linear and full."""
    cells = [(mode, share) for share in map("{:g}".format, result["fractions"]) for mode in result["modes"]]
    told = result["transfer"]
    if told:
        columns = [f"{mode} {100 * float(share):g} %" for mode, share in cells]
        for metric, name in (("auroc", "AUROC"), ("accuracy", "accuracy")):
            rows = [
                [label, *(_cell(told[mode][share]["by_label"][label], metric) for mode, share in cells)]
                for label in result["labels"]
            ]
            rows += [
                [_client(result, c), *(_cell(told[mode][share]["by_client"].get(c), metric) for mode, share in cells)]
                for c in told[cells[0][0]][cells[0][1]]["by_client"]
            ]
            rows.append(["mean of the labels", *(_cell(told[mode][share]["mean"], metric) for mode, share in cells)])
            how = f"mean ± half the 95 % interval over {len(result['seeds'])} draws of the labels"
            title = f"{name} on {result['split']} of {result['data']}, {how}"
            print_table(title, ["label, client", *columns], rows, total=True)
            print()
        sizes = told[cells[0][0]]
        used = ", ".join(
            f"{listed([*map(str, dict.fromkeys(about['labels']))])} at {100 * float(s):g} %"
            for s, about in sizes.items()
        )
        print(f"labelled pairs that were trained on: {used}; a client's row is the mean of its labels")
    if result["split"] == result["val_split"]:
        print(
            f"{result['split']} said when to stop too, so these figures are a little too good; --split test would not be"
        )
    for label, reason in result["labels_left_out"].items():
        print(f"{label}: left out, {reason}")
    if kept is not None:
        print(f"kept in {kept}, which `feddra-ds report` shows")
    print()
    next_step(
        *([f"feddra-ds report {model}"] if kept is not None else []),
        f"feddra-ds probe {model} --data {result['data']}   # quick: scikit-learn on the frozen features",
    )


def _client(result: dict[str, Any], client: str) -> str:
    return f"{client} (held out)" if client in result["held_out"] else client


def _cell(measured: dict[str, Any] | None, metric: str) -> str:
    if measured is None:
        return "–"
    told = measured[metric]
    half = None if told["low"] is None else max(told["high"] - told["mean"], told["mean"] - told["low"])
    spread = "" if half is None else f" ± {decimals(half, 3)}"
    return f"{decimals(told['mean'], 3)}{spread}"
