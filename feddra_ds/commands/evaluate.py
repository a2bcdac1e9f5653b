"""`feddra-ds evaluate`: retrieval per client and pooled, with its chance; zero-shot classification where there are labels."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.files import write_atomic
from feddra_ds.common.text import listed
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.evaluation.gallery import embed_clients, open_split
from feddra_ds.evaluation.labels import weakest
from feddra_ds.evaluation.models import Models, open_models
from feddra_ds.evaluation.retrieval import (
    ABOVE,
    BELOW,
    NUM_SHUFFLES,
    POOLED,
    SURE,
    UNSURE,
    evaluate,
    joint_verdict,
    judged,
)
from feddra_ds.evaluation.zero_shot import zero_shot
from feddra_ds.metrics.ranking import RECALL_AT
from feddra_ds.run.files import EVALUATION_NAME

CONTROL = {
    UNSURE: "The control is at chance.",
    ABOVE: "THE CONTROL IS ABOVE CHANCE: the model finds texts without their pictures. It may put frequent reports first; "
    "or look for texts that occur twice with small differences.",
    BELOW: "THE CONTROL IS BELOW CHANCE: a tie counts against the match, and a model that gives many pictures or many texts "
    "the same embedding has many ties.",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `evaluate` and `probe` share."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.description = (
        f"{parser.description} Of a run as a whole (no --clients, no control) it keeps the result in "
        f"RUN/{EVALUATION_NAME}, which `feddra-ds report RUN` shows."
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
    parser.add_argument("--no-zero-shot", action="store_true", help="leave out zero-shot classification by label names")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where the --shuffled-texts control is not at chance."""
    models = open_models(args.model, args.device)
    root = models.data_root(args.data)
    dataset = open_split(root, args.split, split_ids(args.clients), _trained(models, root))
    galleries = embed_clients(
        models,
        dataset,
        dataset.client_ids,
        args.split,
        max_pairs=args.max_pairs,
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
    )
    trained = models.trained_on(dataset)
    held_out = [c for c in galleries if (c in dataset.held_out if trained is None else c not in trained)]
    result = evaluate(models, galleries, held_out, draws=args.bootstrap, seed=args.seed, shuffled=args.shuffled_texts)
    result = {"model": str(models.source), "round": models.round, "data": root, "split": args.split} | result
    result["without_split"] = [c for c in dataset.client_ids if c not in galleries]
    if not (args.no_zero_shot or args.shuffled_texts):
        result["zero_shot"], result["labels_left_out"] = zero_shot(models, galleries)
    whole = args.clients is None and not args.shuffled_texts
    kept = keep(models, result) if whole and models.is_run else None
    if args.json:
        print(json.dumps(result))
    else:
        show(models, result, kept)
    return 1 if result["control_at_chance"] is False else 0


def keep(models: Models, result: dict[str, Any]) -> str | None:
    """Write RUN/evaluation.json for `report`. Returns its path, or None where the run's folder cannot be written to."""
    path = models.path / EVALUATION_NAME
    try:
        write_atomic(path, json.dumps(result) + "\n")
    except OSError as error:
        print(
            f"feddra-ds: {path} cannot be written ({error.strerror}), so the report will not show this", file=sys.stderr
        )
        return None
    return str(path)


def split_ids(text: str | None) -> list[str] | None:
    """`a,b` as a list; None for None. Raises ValueError for an empty one."""
    if text is None:
        return None
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if not ids:
        raise ValueError("--clients: is empty; leave it out to take all of them")
    return ids


def show(models: Models, result: dict[str, Any], kept: str | None) -> None:
    """The tables, and what they mean. kept: the file that `report` reads them from."""
    if result["shuffled_texts"]:
        print(f"Control: the texts are in random orders, the mean of {NUM_SHUFFLES} of them is shown.")
    _client_table(models, result)
    print("recall in %, image → text and text → image; p is the client's weight in the first round → after the last")
    print("chance: a random order, in which equal reports count for each other; –: no more than k different reports")
    worst = result["worst_client"]
    if worst is not None:
        print(
            f"recall@5 beyond chance (0 = chance, 1 = perfect): mean {_signed(worst['mean_skill@5'])}, "
            f"worst {_signed(worst['skill@5'])} ({worst['id']}), spread {worst['spread_skill@5']:.3f}"
        )
    print()
    _interval_table(result)
    if result["without_split"]:
        print(f"no {result['split']} split, so not measured: {listed(result['without_split'])}")
    skipped = [
        f"{client} ({', '.join(f'{reason}: {n}' for reason, n in about['skipped'].items())})"
        for client, about in result["clients"].items()
        if about["skipped"]
    ]
    if skipped:
        print(f"unreadable samples were left out: {listed(skipped)}")
    if "zero_shot" in result:
        print()
        _zero_shot_table(result)
    if result["shuffled_texts"]:
        print(CONTROL[joint_verdict(result)])
    if kept is not None:
        print(f"\nkept in {kept}, which `feddra-ds report` shows")
    print()
    next_step(*_advice(models, result))


def _client_table(models: Models, result: dict[str, Any]) -> None:
    lines = models.run.lines if models.run is not None else []
    rows: list[list[object]] = []
    for client, about in result["clients"].items():
        rows.append([_name(client, about, result["split"]), about["pairs"], *_weights(lines, client), *_recalls(about)])
    for name in ("mean", "worst", "spread"):
        rows.append([name, "", "", _number(_across_losses(lines, name)), *_recalls(result[name])])
    if result[POOLED]:
        rows.append(["all, one gallery", result[POOLED]["pairs"], "", "", *_recalls(result[POOLED])])
    cuts = "/".join(str(k) for k in RECALL_AT)
    columns = ["client", "pairs", "p", "loss", f"i→t @{cuts}", f"t→i @{cuts}", f"chance @{cuts}"]
    if not lines:
        rows = [[row[0], row[1], *row[4:]] for row in rows]
        columns = columns[:2] + columns[4:]
    print_table(f"{models.source} on {result['split']} of {result['data']}", columns, rows)


def _name(client: str, about: dict[str, Any], split: str) -> str:
    other = f", {about['split']}" if about.get("split", split) != split else ""
    return f"{client} (held out{other})" if about.get("held_out") else client


def _weights(lines: list[dict[str, Any]], client: str) -> tuple[str, str]:
    """p in the first round → after the last, and the last loss."""
    if not lines or client not in lines[-1]["client_ids"]:
        return "–", "–"
    i, last = lines[-1]["client_ids"].index(client), lines[-1]
    after = last.get("next_client_weights") or last["client_weights"]
    return f"{lines[0]['client_weights'][i]:.2f} → {after[i]:.2f}", _number(last["client_losses"][i])


def _across_losses(lines: list[dict[str, Any]], what: str) -> float | None:
    known = [loss for loss in lines[-1]["client_losses"] if loss is not None] if lines else []
    if not known:
        return None
    return {"mean": sum(known) / len(known), "worst": max(known), "spread": max(known) - min(known)}[what]


def _recalls(about: dict[str, Any]) -> list[str]:
    cells = []
    for key in ("i2t_recall", "t2i_recall", "chance"):
        values = [about.get(f"{key}@{k}") for k in RECALL_AT]
        cells.append("/".join(percent(v) for v in values) if any(v is not None for v in values) else "")
    return cells


def _interval_table(result: dict[str, Any]) -> None:
    rows = []
    for name, about in judged(result).items():
        for key, e in about["intervals"].items():
            rows.append(
                [
                    "all" if name == POOLED else _name(name, about, result["split"]),
                    key,
                    percent(e["recall"]),
                    f"{percent(e['low'])} to {percent(e['high'])}",
                    percent(e["chance"]),
                    f"{e['recall'] / e['chance']:.1f}",
                    e["verdict"],
                ]
            )
    if result["shuffled_texts"]:
        how, interval = f"{SURE:g} standard errors each way, over the random orders", "interval"
    else:
        how, interval = "resampled by patient where the json names one, else by text", "95 % interval"
    print_table(
        f"Against chance ({how})", ["gallery", "both ways", "%", interval, "chance", "× chance", "verdict"], rows
    )


def _zero_shot_table(result: dict[str, Any]) -> None:
    rows = []
    for label, about in result["zero_shot"].items():
        worst = weakest(about["clients"])
        pooled = about[POOLED]
        rows.append(
            [
                label,
                int(pooled["n"]),
                int(pooled["positives"]) if "positives" in pooled else f"{about['classes']} classes",
                f"{pooled['auroc']:.3f}",
                f"{pooled['balanced_accuracy']:.3f}",
                "–" if worst is None else f"{worst[1]:.3f} ({worst[0]})",
            ]
        )
    if rows:
        columns = ["label", "pairs", "positive", "AUROC", "balanced acc.", "worst client's AUROC"]
        print_table("Zero-shot by label names, all of these galleries (chance: AUROC 0.5)", columns, rows)
    else:
        print("Zero-shot classification: the samples have no labels that could be told apart")
    for label, reason in result["labels_left_out"].items():
        print(f"  {label}: left out, {reason}")


def _advice(models: Models, result: dict[str, Any]) -> list[str]:
    out = []
    if not result["shuffled_texts"]:
        command = f"feddra-ds evaluate {models.path} --data {result['data']} --shuffled-texts"
        out.append(f"{command}   # the control: must be at chance")
    if models.run is not None:
        out.append(f"feddra-ds report {models.run.path}")
    if result.get("zero_shot"):
        label = next(iter(result["zero_shot"])).partition(":")[0]
        out.append(f"feddra-ds probe {models.path} --data {result['data']} --label-key {label}")
    return out or [f"feddra-ds evaluate {models.path} --data {result['data']}"]


def percent(value: float | None) -> str:
    """A share in %: one decimal below 10, none above; – where there is none."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if abs(value) < 0.0995 else f"{100 * value:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no -0.000


def _trained(models: Models, root: str) -> list[str] | None:
    return models.trained_on(open_dataset(root))


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
