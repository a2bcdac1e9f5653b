"""The report's tables: clients, their galleries over the rounds, what was left out, and what `evaluate` measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.evaluation.labels import weakest
from feddra_ds.metrics.ranking import RECALL_AT
from feddra_ds.report.charts import NUM_COLOURS
from feddra_ds.run.files import RunFiles

_MAX_BARS = 12


def both_ways(about: dict[str, float], k: int) -> float | None:
    """Recall@k, the mean of both directions; None where the gallery is too small."""
    if f"i2t_recall@{k}" not in about:
        return None
    return (about[f"i2t_recall@{k}"] + about[f"t2i_recall@{k}"]) / 2


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
                "val": val.get(name),
                "recall": {k: both_ways(val[name], k) for k in RECALL_AT} if name in val else {},
            }
        )
    return out


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


def training_pairs(files: RunFiles) -> dict[str, int]:
    """Training pairs by client, from the dataset where it is at hand."""
    try:
        dataset: Dataset = open_dataset(str(files.get("data.root")))
        counts = {client: dataset.num_samples(client, "train") for client in dataset.clients}
    except (DataError, OSError):
        return {}
    if len(files.client_ids) == 1 and files.client_ids[0] not in counts:  # the centralised strategy
        wanted = files.get("clients.ids") or dataset.client_ids
        counts[files.client_ids[0]] = sum(counts.get(c, 0) for c in wanted)
    return counts


def skipped_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(client, reason, samples) over all rounds."""
    totals: Counter[tuple[str, str]] = Counter()
    for line in lines:
        for client, counts in line["skipped_samples"].items():
            for reason, count in counts.items():
                totals[client, reason] += count
    return [(client, reason, count) for (client, reason), count in sorted(totals.items())]


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
        "labels": [
            {"name": label, **about["pooled"], "classes": about["classes"], "weakest": weakest(about["clients"])}
            for label, about in told.get("zero_shot", {}).items()
        ],
    }
