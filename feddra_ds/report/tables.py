"""The report's tables: clients, their galleries over the rounds, what was left out, and what `evaluate` measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from feddra_ds.common.text import number, percent
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.labels import weakest
from feddra_ds.evaluation.mixture import RECALL, mixture_rows, set_in_words
from feddra_ds.metrics.ranking import RECALL_AT
from feddra_ds.report.charts import NUM_COLOURS
from feddra_ds.report.evaluation_charts import calibration_diagrams, subgroup_bars
from feddra_ds.run.files import RunFiles, training_pairs

_MAX_BARS = 12
STAGES = {
    "stage1": "stage 1",
    "stage2": "stage 2",
    "aggregate": "averaging",
    "evaluate": "evaluation",
    "checkpoint": "checkpoint",
}


def both_ways(about: dict[str, float], k: int) -> float | None:
    """Recall@k, the mean of both directions; None where the gallery is too small."""
    if f"i2t_recall@{k}" not in about:
        return None
    return (about[f"i2t_recall@{k}"] + about[f"t2i_recall@{k}"]) / 2


def mean_of(values: Sequence[float | None] | None) -> float | None:
    """The mean of those that are there; None for none."""
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None


def gain_in_words(gain: dict[str, Any] | None) -> str | None:
    """A line's `robust_gain` as a sentence; None where there is none, or no gain to attain."""
    if not gain or gain["share"] is None:
        return None
    return (
        f"The mixture's loss Σ p L is {number(gain['mixture'])}, the mean {number(gain['mean'])}, and the most that p could "
        f"reach {number(gain['best'])}: p attains {percent(gain['share'])} % of the robust gain."
    )


def clipped_in_words(item: dict[str, Any]) -> str:
    """What became of a loss in a line's `clipped_losses`."""
    shown = lambda value: f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
    used = "left out, p kept" if item.get("used") is None else f"taken as {shown(item['used'])}"
    return f"loss {shown(item.get('reported'))}, {used}"


def styles(files: RunFiles) -> dict[str, str]:
    """A colour per client; with more clients than colours, those whose weights moved furthest have one."""
    ids, last = files.client_ids, files.lines[-1]
    p = last.get("next_client_weights") or last["client_weights"]
    ranked = sorted(range(len(ids)), key=lambda i: -abs(p[i] - 1 / len(ids)))
    coloured = sorted(ranked[:NUM_COLOURS]) if len(ids) > NUM_COLOURS else list(range(len(ids)))
    return {client: f"c{coloured.index(i)}" if i in coloured else "muted" for i, client in enumerate(ids)}


def client_rows(files: RunFiles, val: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per client and per other gallery that was evaluated."""
    lines, ids = files.lines, files.client_ids
    pairs = training_pairs(files)
    style = styles(files) if lines else {}
    out = []
    for name in [*ids, *(c for c in val if c not in ids and c != "all")]:
        i = ids.index(name) if name in ids else None
        last = lines[-1] if lines else {}
        after = (last.get("next_client_weights") or last.get("client_weights")) if last else None
        out.append(
            {
                "id": name,
                "style": style.get(name, "muted"),
                "pairs": pairs.get(name),
                "p_first": lines[0]["client_weights"][i] if i is not None and lines else None,
                "p_last": after[i] if i is not None and after else None,
                "loss": last["client_losses"][i] if i is not None and last else None,
                "loss_se": _entry(last, "client_losses_se", i),
                "train_loss": _entry(last, "client_train_losses", i),
                "val": val.get(name),
                "recall": {k: both_ways(val[name], k) for k in RECALL_AT} if name in val else {},
            }
        )
    return out


def _entry(line: dict[str, Any], key: str, i: int | None) -> Any:
    """Client i's value in a line's list; None where the line, of an older run, has no such list."""
    return line[key][i] if i is not None and line.get(key) else None


def mean_gallery(galleries: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every recall and chance over the galleries that have it."""
    keys = dict.fromkeys(key for about in galleries for key in about if "@" in key)
    columns = {key: [about[key] for about in galleries if key in about] for key in keys}
    return {key: sum(values) / len(values) for key, values in columns.items()}


def recall_bars(files: RunFiles, val: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the chart of recall@5 per client; of many clients, those that are lowest against their chance."""
    rows = [row for row in client_rows(files, val) if row["val"]]
    if len(rows) <= _MAX_BARS:
        return rows
    rows = [row for row in rows if row["recall"][5] is not None]
    return sorted(rows, key=lambda row: row["recall"][5] - row["val"]["chance@5"])[:_MAX_BARS]


def skipped_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(client, reason, samples) over all rounds."""
    totals: Counter[tuple[str, str]] = Counter()
    for line in lines:
        for client, counts in line["skipped_samples"].items():
            for reason, count in counts.items():
                totals[client, reason] += count
    return [(client, reason, count) for (client, reason), count in sorted(totals.items())]


def skipped_step_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(client, stage, local steps skipped) over all rounds."""
    totals: Counter[tuple[str, str]] = Counter()
    for line in lines:
        for client, counts in (line.get("skipped_steps") or {}).items():
            for stage, count in counts.items():
                totals[client, stage] += count
    return [(client, stage, count) for (client, stage), count in sorted(totals.items()) if count]


def cost_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each stage of a round takes: seconds, the mean over the rounds; bytes that a rank sends in it, and memory that the
    fullest takes, the most of any round, None where the lines, of an older run, do not say."""
    mean = lambda key: mean_of([line["stage_seconds"].get(key) for line in lines])
    most = lambda column, key: max(
        (line[column][key] for line in lines if key in (line.get(column) or {})), default=None
    )
    return [
        {
            "stage": label,
            "seconds": mean(key),
            "sent": most("stage_bytes_sent", key),
            "memory": most("stage_memory_bytes", key),
        }
        for key, label in STAGES.items()
    ]


def clipped_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By client whose loss was not believed as reported: in how many rounds, the last of them, and what became of it."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        for item in line.get("clipped_losses") or []:
            rounds = rows.get(item["id"], {}).get("rounds", 0) + 1
            rows[item["id"]] = {
                "id": item["id"],
                "rounds": rounds,
                "last": line["round"],
                "how": clipped_in_words(item),
            }
    return sorted(rows.values(), key=lambda row: str(row["id"]))


def evaluation(files: RunFiles) -> dict[str, Any] | None:
    """What the last `feddra-ds evaluate RUN` measured, as the page shows it; None where there was none.

    newer: rounds that ended after the one that was measured.
    """
    told = files.evaluation
    if not told:
        return None
    galleries = [(name, about) for name, about in told["clients"].items()]
    galleries += [("all, one gallery", told["pooled"])] if told["pooled"] else []
    return {
        "round": told["round"],
        "newer": files.rounds_done - 1 - told["round"],
        "split": told["split"],
        "data": told["data"],
        "rows": [
            {
                "name": name,
                "held_out": about.get("held_out", False),
                "split": about.get("split", told["split"]),
                "pairs": about["pairs"],
                "recalls": {k: about["intervals"].get(f"recall@{k}") for k in RECALL_AT},
            }
            for name, about in galleries
        ],
        "without_split": told["without_split"],
        "non_finite": finite.in_words(told.get("non_finite") or {}),
        "mixture": _mixture(told.get("worst_mixture")),
        "labels": [
            {"name": label, **about["pooled"], "classes": about["classes"], "weakest": weakest(about["clients"])}
            for label, about in told.get("zero_shot", {}).items()
        ],
        "subgroups": subgroup_bars(told.get("subgroups")),
        "calibration": calibration_diagrams(told.get("zero_shot", {})),
    }


def transfer(files: RunFiles) -> dict[str, Any] | None:
    """What the last `feddra-ds finetune RUN` measured, as the page shows it; None where there was none.

    columns: (mode, share in %) of the cells of each row. newer: rounds that ended after the one that was measured.
    """
    told = files.transfer
    if not told:
        return None
    cells = [about for fraction in told["fractions"] for mode in told["modes"]
             if (about := told["transfer"].get(mode, {}).get(f"{fraction:g}"))]  # fmt: skip
    names = [(f"{mode} {100 * fraction:g} %") for fraction in told["fractions"] for mode in told["modes"]]
    rows = [{"name": "all labels, the mean", "cells": [about["mean"] for about in cells], "is_sum": True}]
    rows += [{"name": label, "cells": [about["by_label"][label] for about in cells]} for label in told["labels"]]
    rows += [
        {
            "name": client,
            "held_out": client in told["held_out"],
            "cells": [about["by_client"].get(client) for about in cells],
        }
        for client in (cells[0]["by_client"] if cells else {})
    ]
    return {
        "newer": 0 if told["round"] is None else files.rounds_done - 1 - told["round"],
        "columns": names,
        "rows": rows if cells else [],
        "non_finite": [
            f"{split}: {line}" for split, found in told["non_finite"].items() for line in finite.in_words(found)
        ],
        **{key: told[key] for key in ("round", "split", "val_split", "data", "labels_left_out")},
        "num_seeds": len(told["seeds"]),
    }


def _mixture(told: dict[str, Any] | None) -> dict[str, Any] | None:
    if not told:
        return None
    weights = {"loss": told["weights_by_loss"], "recall": told["weights_by_recall"]}
    by_weight = lambda of: sorted(of.items(), key=lambda item: -item[1])
    return {
        "set": set_in_words(told),
        "chance": told.get("loss_by_chance"),
        "rows": [{"name": name, "loss": of.get("loss"), "recall": of.get(RECALL)} for name, of in mixture_rows(told)],
        "weights": {what: [f"{c} {w:.2f}" for c, w in by_weight(of)] for what, of in weights.items() if of},
    }
