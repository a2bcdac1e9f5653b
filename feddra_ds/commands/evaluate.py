"""`feddra-ds evaluate`: retrieval per client and pooled, with its chance; the worst mixture; zero-shot where there are labels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from feddra_ds.commands._model_arguments import (
    add_model_arguments,
    call_options,
    keep_for_report,
    options,
    positive,
    split_ids,
)
from feddra_ds.evaluation import finite

EXAMPLES = (
    "feddra-ds evaluate runs/mine",
    "feddra-ds evaluate exports/mine --data data/mine --subgroup age,sex --json",
    "feddra-ds evaluate runs/mine --compare runs/fedavg   # differences, with paired intervals",
    "feddra-ds evaluate runs/mine --shuffled-texts   # the control: must be at chance",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.description = (
        f"{parser.description} Of a run as a whole (no --clients, no control, no --ema) it keeps the result in "
        "RUN/evaluation.json, which `feddra-ds report RUN` shows."
    )
    add_model_arguments(parser)
    parser.add_argument("--split", default="val", metavar="NAME", help="split to measure on (default: val)")
    parser.add_argument(
        "--max-pairs", type=positive, default=2048, metavar="N", help="most pairs of a client (default: 2048)"
    )
    parser.add_argument(
        "--bootstrap", type=positive, default=1000, metavar="N", help="resamplings of the intervals (default: 1000)"
    )
    parser.add_argument(
        "--shuffled-texts",
        action="store_true",
        help="control: put the texts into random orders; recall must then be at its chance",
    )
    parser.add_argument(
        "--worst-over",
        metavar="SET",
        help="where the worst mixture is looked for: chi2:RADIUS, kl:RADIUS, cvar:RADIUS or simplex, so that runs can be "
        "compared (default: where the run's p may move; chi2:1 where that is one mixture alone)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="measure the run's average over rounds (aggregate.ema) in place of its model"
    )
    parser.add_argument(
        "--match-by",
        default="match",
        metavar="FIELD",
        help="field of the samples' json whose equal values make a client's pairs matches of each other, such as study "
        "(default: match)",
    )
    parser.add_argument(
        "--subgroup",
        metavar="A,B",
        help="fields of the json, such as age,sex,scanner: measure the pairs of each value apart, and name the worst",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="YAML of zero-shot prompts, label: {class: [prompt, ...]} (default: label names)",
    )
    parser.add_argument(
        "--compare", metavar="MODEL2", help="a second run or model on the same pairs: differences, paired intervals"
    )
    parser.add_argument(
        "--save-embeddings", metavar="FILE", help="write the embeddings as FILE.safetensors or FILE.parquet"
    )
    parser.add_argument("--no-zero-shot", action="store_true", help="leave out zero-shot classification")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where weights or embeddings are not finite, or the --shuffled-texts control is not at chance."""
    from feddra_ds.commands._evaluate_tables import show
    from feddra_ds.distributed.shares import launched_world
    from feddra_ds.evaluation.evaluate import evaluate  # late: torch and transformers, which --help can do without
    from feddra_ds.evaluation.models import run_of
    from feddra_ds.run.files import EVALUATION_NAME, is_run

    path = Path(args.model).expanduser()
    with launched_world(options(args)) as world:
        result = evaluate(
            path,
            **call_options(args),
            bootstrap=args.bootstrap,
            zero_shot=not args.no_zero_shot,
            shuffled_texts=args.shuffled_texts,
            worst_over=args.worst_over,
            match_by=args.match_by,
            subgroups=split_ids(args.subgroup, "--subgroup") or (),
            prompts=args.prompts,
            compare=args.compare,
            save_embeddings=args.save_embeddings,
            world=world,
        )
    if not world.is_first:
        return 0
    of_the_whole_run = is_run(path) and args.clients is None and not args.shuffled_texts and not args.ema
    kept = keep_for_report(path / EVALUATION_NAME, result) if of_the_whole_run else None
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(path, run_of(path), result, kept)
    spoilt = finite.in_words(result["non_finite"])
    spoilt += [f"--compare: {line}" for line in finite.in_words(result.get("compared", {}).get("non_finite", {}))]
    return max(finite.complain(spoilt), int(result["control_at_chance"] is False))
