"""What the page of several runs says: how each went, how their configs differ, and what evaluate and finetune kept of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from feddra_ds import __version__
from feddra_ds.common.text import duration, number, percent, size
from feddra_ds.common.tree import flat
from feddra_ds.evaluation.mixture import RECALL
from feddra_ds.report.charts import NUM_COLOURS, Series, line_chart
from feddra_ds.report.contents import last_val
from feddra_ds.report.tables import both_ways, evaluation, transfer
from feddra_ds.run.files import RunFiles

_OWN = ("run.output_dir", "run.name")  # keys that differ between any two runs
_NONE = "–"


def side_by_side(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What the template shows of several runs. Raises ValueError for one that is given twice, and for more than have a colour."""
    if len(runs) > NUM_COLOURS:
        raise ValueError(f"RUN: {len(runs)} runs are more than the {NUM_COLOURS} that can be told apart on one page")
    paths = [run.path.resolve() for run in runs]
    if twice := [str(path) for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(f"RUN: {', '.join(twice)} is given twice")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    named = dict(zip(names, runs, strict=True))
    return {
        "names": names,
        "rows": [_row(name, run) for name, run in named.items()],
        "differences": differences(named),
        "charts": _charts(named),
        "evaluations": _evaluations(named),
        "transfers": _transfers(named),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
    }


def _row(name: str, run: RunFiles) -> dict[str, Any]:
    """A run's column of the first table. cells: what is measured → its text; of rounds, where one has ended."""
    cells = {"strategy": run.get("strategy.name") or _NONE, "state": run.state()[0]}
    cells["rounds"] = f"{run.rounds_done} of {run.num_rounds}"
    if run.lines:
        cells |= _of_rounds(run)
    return {"run": name, "path": str(run.path), "cells": cells}


def _of_rounds(run: RunFiles) -> dict[str, str]:
    last, pooled = run.lines[-1], last_val(run.lines).get("all")
    known = [loss for loss in last["client_losses"] if loss is not None]
    recall, chance = (both_ways(pooled, 5), pooled.get("chance@5")) if pooled else (None, None)
    gain = last.get("robust_gain") or {}
    excluded = Counter(item["id"] for line in run.lines for item in line["excluded_clients"])
    peak, sent = last.get("peak_memory_bytes"), [line.get("bytes_sent_per_rank", 0) for line in run.lines]
    return {
        "mean loss": number(last["mean_loss"]),
        "worst loss": number(last["worst_loss"]),
        "spread": number(max(known) - min(known)) if len(known) > 1 else _NONE,
        "recall@5 (chance)": _NONE if recall is None else f"{percent(recall)} % ({percent(chance)} %)",
        "robust gain": _NONE if gain.get("share") is None else f"{percent(gain['share'])} %",
        "left out": ", ".join(f"{client} × {count}" for client, count in sorted(excluded.items())) or "nobody",
        "sent a rank, a round": size(sum(sent) / len(sent)),
        "peak memory": size(max(peak)) if peak else _NONE,
        "time": duration(sum(line.get("seconds") or 0.0 for line in run.lines)),
    }


def differences(named: dict[str, RunFiles]) -> list[tuple[str, list[str]]]:
    """(config key, its value in each run) of the keys whose values differ; – where a run has none."""
    trees = [flat(run.config) for run in named.values()]
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in _OWN)
    out = []
    for key in keys:
        values = [_shown(tree[key]) if key in tree else _NONE for tree in trees]
        if len(set(values)) > 1:
            out.append((key, values))
    return out


def _shown(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("\n...\n").strip()
    )


def _charts(named: dict[str, RunFiles]) -> dict[str, Markup]:
    """Lines over rounds, one a run; those of nothing left out."""
    rounds = sorted({line["round"] for run in named.values() for line in run.lines})
    if not rounds:
        return {}
    column: Callable[[RunFiles, Callable[[dict[str, Any]], float | None]], list[float | None]] = lambda run, of: [
        {line["round"]: of(line) for line in run.lines}.get(r) for r in rounds
    ]
    share = lambda value: f"{percent(value)} %"
    pooled = lambda line: both_ways((line.get("val") or {}).get("all") or {}, 5)
    measured: dict[str, tuple[Callable[[dict[str, Any]], float | None], Callable[[float], str]]] = {
        "Mean loss": (lambda line: line["mean_loss"], number),
        "Worst client's loss": (lambda line: line["worst_loss"], number),
        "Recall@5, one gallery of all clients": (pooled, share),
        "Share of the robust gain": (lambda line: (line.get("robust_gain") or {}).get("share"), share),
    }
    out = {}
    for title, (of, show) in measured.items():
        series = [Series(name, column(run, of), f"c{i}") for i, (name, run) in enumerate(named.items())]
        if any(value is not None for one in series for value in one.values):
            out[title] = line_chart(series, rounds, title=f"{title} over rounds", show=show)
    return out


def _evaluations(named: dict[str, RunFiles]) -> dict[str, Any] | None:
    """rows: (gallery or mixture, a cell a run) of what `evaluate` kept; about: (run, round, split, data, rounds since)."""
    told = {name: found for name, run in named.items() if (found := evaluation(run))}
    if not told:
        return None
    recalls = {name: {row["name"]: row["recalls"][5] for row in found["rows"]} for name, found in told.items()}
    galleries = dict.fromkeys(gallery for of in recalls.values() for gallery in of)
    rows = [(gallery, [_recall(recalls.get(name, {}).get(gallery)) for name in named]) for gallery in galleries]
    worst = {
        name: next((row for row in found["mixture"]["rows"]), None) if found["mixture"] else None
        for name, found in told.items()
    }
    mixture = [
        (what, [_interval((worst.get(name) or {}).get(key), show) for name in named])
        for what, key, show in (
            ("worst mixture's loss", "loss", number),
            (f"worst mixture's {RECALL}", "recall", _percent),
        )
    ]
    rows += [(what, cells) for what, cells in mixture if any(cells)]
    about = [(name, found["round"], found["split"], found["data"], found["newer"]) for name, found in told.items()]
    sets = {found["mixture"]["set"] for found in told.values() if found["mixture"]}
    return {"rows": rows, "about": about, "sets": sorted(sets), "non_finite": _spoilt(told)}


def _transfers(named: dict[str, RunFiles]) -> dict[str, Any] | None:
    """rows: (mode and share, a cell a run): AUROC over all labels, of what `finetune` kept."""
    told = {name: found for name, run in named.items() if (found := transfer(run))}
    if not told:
        return None
    cells = {
        name: dict(zip(found["columns"], found["rows"][0]["cells"], strict=True)) if found["rows"] else {}
        for name, found in told.items()
    }
    columns = dict.fromkeys(column for of in cells.values() for column in of)
    auroc = lambda cell: None if cell is None else {"value": cell["auroc"]["mean"], **cell["auroc"]}
    rows = [(c, [_interval(auroc(cells.get(name, {}).get(c)), number) for name in named]) for c in columns]
    about = [(name, found["round"], found["split"], found["data"], found["newer"]) for name, found in told.items()]
    return {"rows": rows, "about": about, "non_finite": _spoilt(told)}


def _spoilt(told: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{name}: {line}" for name, found in told.items() for line in found["non_finite"]]


def _percent(value: float) -> str:
    return f"{percent(value)} %"


def _recall(e: dict[str, Any] | None) -> dict[str, str] | None:
    if not e:
        return None
    shown = {"value": _percent(e["recall"]), "interval": f"{percent(e['low'])} to {percent(e['high'])}"}
    return shown | {"note": f"chance {percent(e['chance'])}"}


def _interval(of: dict[str, Any] | None, show: Callable[[float], str]) -> dict[str, str] | None:
    if not of or of["value"] is None:
        return None
    interval = "" if of["low"] is None else f"{show(of['low'])} to {show(of['high'])}"
    return {"value": show(of["value"]), "interval": interval, "note": ""}
