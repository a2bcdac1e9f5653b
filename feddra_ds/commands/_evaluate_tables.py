"""The tables of `feddra-ds evaluate`, and what they mean; this file is not a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.text import decimals, listed, percent
from feddra_ds.evaluation.labels import weakest
from feddra_ds.evaluation.mixture import RECALL, chance_in_words, mixture_rows, set_in_words
from feddra_ds.evaluation.verdict import ABOVE, BELOW, NUM_SHUFFLES, POOLED, SURE, UNSURE, joint_verdict, judged
from feddra_ds.metrics.ranking import RECALL_AT
from feddra_ds.run.files import RunFiles

CONTROL = {
    UNSURE: "The control is at chance.",
    ABOVE: "THE CONTROL IS ABOVE CHANCE: the model finds texts without their pictures. It may put frequent reports first; "
    "or look for texts that occur twice with small differences.",
    BELOW: "THE CONTROL IS BELOW CHANCE: a tie counts against the match, and a model that gives many pictures or many texts "
    "the same embedding has many ties.",
}


def show(path: Path, run: RunFiles | None, result: dict[str, Any], kept: Path | None) -> None:
    """The tables, and what they mean. path: of the run or model; run: None for an export; kept: the file that `report`
    reads them from."""
    if result["shuffled_texts"]:
        print(f"Control: the texts are in random orders, the mean of {NUM_SHUFFLES} of them is shown.")
    _client_table(run, result)
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
    _rank_table(result)
    if result.get("worst_mixture"):
        print()
        _mixture_table(result["worst_mixture"])
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
    _subgroup_table(result.get("subgroups"))
    _comparison_table(result.get("compared"))
    if result["shuffled_texts"]:
        print(CONTROL[joint_verdict(result)])
    if "embeddings" in result:
        print(f"wrote {result['embeddings']}")
    if kept is not None:
        print(f"\nkept in {kept}, which `feddra-ds report` shows")
    print()
    next_step(*_advice(path, run, result))


def _client_table(run: RunFiles | None, result: dict[str, Any]) -> None:
    lines = run.lines if run is not None else []
    rows: list[list[object]] = []
    for client, about in result["clients"].items():
        rows.append([_name(client, about, result["split"]), about["pairs"], *_weights(lines, client), *_recalls(about)])
    for name in ("mean", "worst", "spread"):
        rows.append([name, "", "", decimals(_across_losses(lines, name), 3), *_recalls(result[name])])
    if result[POOLED]:
        rows.append(["all, one gallery", result[POOLED]["pairs"], "", "", *_recalls(result[POOLED])])
    cuts = "/".join(str(k) for k in RECALL_AT)
    columns = ["client", "pairs", "p", "loss", f"i→t @{cuts}", f"t→i @{cuts}", f"chance @{cuts}"]
    if not lines:
        rows = [[row[0], row[1], *row[4:]] for row in rows]
        columns = columns[:2] + columns[4:]
    whose = ", average over rounds," if result["ema"] else ""
    print_table(f"{result['model']}{whose} on {result['split']} of {result['data']}", columns, rows)


def _name(client: str, about: dict[str, Any], split: str) -> str:
    other = f", {about['split']}" if about.get("split", split) != split else ""
    return f"{client} (held out{other})" if about.get("held_out") else client


def _weights(lines: list[dict[str, Any]], client: str) -> tuple[str, str]:
    """p in the first round → after the last, and the last loss."""
    if not lines or client not in lines[-1]["client_ids"]:
        return "–", "–"
    i, last = lines[-1]["client_ids"].index(client), lines[-1]
    after = last.get("next_client_weights") or last["client_weights"]
    return f"{lines[0]['client_weights'][i]:.2f} → {after[i]:.2f}", decimals(last["client_losses"][i], 3)


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


def _rank_table(result: dict[str, Any]) -> None:
    keys = ("i2t_median_rank", "t2i_median_rank", "i2t_map", "t2i_map")
    shape = ("alignment", "image_uniformity", "text_uniformity", "modality_gap")
    rows: list[list[object]] = []
    for name, about in (result["clients"] | ({POOLED: result[POOLED]} if result[POOLED] else {})).items():
        if keys[0] in about:
            geometry = about["geometry"] or {}
            cells = [f"{about[key]:g}" for key in keys[:2]] + [decimals(about[key], 3) for key in keys[2:]]
            label = "all, one gallery" if name == POOLED else _name(name, about, result["split"])
            rows.append([label, *cells, *(decimals(geometry.get(key), 2) for key in shape)])
    ranked = ["median rank i→t", "t→i", "mAP i→t", "t→i"]
    columns = ["client", *ranked, "alignment", "uniformity of images", "of texts", "modality gap"]
    if rows:
        print()
        print_table("Ranks, and how the embeddings lie", columns, rows)


def _subgroup_table(told: dict[str, Any] | None) -> None:
    if not told:
        return
    rows: list[list[object]] = []
    for field, values in told["fields"].items():
        for value, about in values.items():
            e = about.get("recall@5")
            interval = f"{percent(e['low'])} to {percent(e['high'])}" if e else ""
            cells = [percent(e["recall"]), interval, percent(e["chance"])] if e else ["–", "", ""]
            rows.append([f"{field} = {value}", about["pairs"], *cells])
    print()
    print_table("Subgroups", ["pairs with", "pairs", "recall@5 %", "95 % interval", "chance"], rows)
    if (worst := told["worst"]) is not None:
        print(
            f"worst subgroup: {worst['field']} = {worst['value']}, "
            f"recall@5 {percent(worst['recall'])} % ({percent(worst['low'])} to {percent(worst['high'])})"
        )


def _comparison_table(told: dict[str, Any] | None) -> None:
    if not told:
        return
    rows: list[list[object]] = []
    of_all = [(f"{name}, {k} %", e, 100, 1) for name, ks in told["retrieval"].items() for k, e in ks.items()]
    of_all += [(f"{label}, AUROC", e, 1, 3) for label, e in told["zero_shot"].items()]
    for name, e, unit, digits in of_all:
        first, second, difference, low, high = (
            decimals(unit * e[key], digits) for key in ("first", "second", "difference", "low", "high")
        )
        rows.append([name, first, second, difference, f"{low} to {high}"])
    print()
    print_table(
        f"Against {told['model']}, on the same pairs", ["", "this", "other", "difference", "95 % interval"], rows
    )


def _mixture_table(told: dict[str, Any]) -> None:
    rows = []
    for name, about in mixture_rows(told):
        loss, recall = about.get("loss"), about.get(RECALL)
        rows.append(
            [
                name,
                decimals(loss and loss["value"], 3),
                f"{loss['low']:.3f} to {loss['high']:.3f}" if loss else "",
                percent(recall and recall["value"]),
                f"{percent(recall['low'])} to {percent(recall['high'])}" if recall else "",
            ]
        )
    columns = ["pairs of", "loss", "95 % interval", "recall@5 %", "95 % interval"]
    title = f"The worst mixture of the clients within the {set_in_words(told)}{chance_in_words(told)}"
    print_table(title, columns, rows)
    for what, key in (("loss", "weights_by_loss"), ("recall", "weights_by_recall")):
        if told[key]:
            heaviest = sorted(told[key].items(), key=lambda item: -item[1])
            print(f"its weights by {what}: {listed([f'{name} {weight:.2f}' for name, weight in heaviest])}")
    for what, clients in told["too_few_pairs"].items():
        if clients:
            print(f"too few pairs for a {what}, so in no mixture by it: {listed(clients)}")


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
                f"{pooled['auroc']:.3f} ({decimals(pooled['auroc_low'], 2)} to {decimals(pooled['auroc_high'], 2)})",
                *(f"{pooled[key]:.3f}" for key in ("auprc", "f1", "balanced_accuracy")),
                decimals(pooled["calibration"] and pooled["calibration"]["ece"], 3),
                "–" if worst is None else f"{worst[1]:.3f} ({worst[0]})",
            ]
        )
    if rows:
        columns = ["label", "pairs", "positive", "AUROC", "AUPRC", "F1", "balanced acc.", "ECE", "worst client's AUROC"]
        print_table("Zero-shot classification, all of these galleries (chance: AUROC 0.5)", columns, rows)
    else:
        print("Zero-shot classification: the samples have no labels that could be told apart")
    for label, reason in result["labels_left_out"].items():
        print(f"  {label}: left out, {reason}")


def _advice(path: Path, run: RunFiles | None, result: dict[str, Any]) -> list[str]:
    out, whose = [], " --ema" if result["ema"] else ""
    if not result["shuffled_texts"]:
        command = f"feddra-ds evaluate {path} --data {result['data']}{whose} --shuffled-texts"
        out.append(f"{command}   # the control: must be at chance")
    if run is not None:
        out.append(f"feddra-ds report {run.path}")
    if result.get("zero_shot"):
        label = next(iter(result["zero_shot"])).partition(":")[0]
        out.append(f"feddra-ds probe {path} --data {result['data']} --label-key {label}")
    return out or [f"feddra-ds evaluate {path} --data {result['data']}"]


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no -0.000
