"""What the report says: numbers, sentences, charts and tables of a run, from its files."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import yaml
from markupsafe import Markup

from feddra_ds import __version__
from feddra_ds.common.text import duration, number, percent
from feddra_ds.evaluation.mixture import objective_of, set_of
from feddra_ds.metrics.ranking import RECALL_AT
from feddra_ds.report.charts import Series, line_chart, stacked_bars
from feddra_ds.report.tables import (
    STAGES,
    both_ways,
    client_rows,
    clipped_rows,
    cost_rows,
    evaluation,
    gain_in_words,
    mean_gallery,
    mean_of,
    recall_bars,
    skipped_rows,
    skipped_step_rows,
    styles,
    transfer,
)
from feddra_ds.run.files import RunFiles
from feddra_ds.strategies import robust_weights

KEY_FACTS = {
    "strategy.name": "strategy",
    "schedule.rounds": "rounds",
    "schedule.stage1_steps": "steps of stage 1",
    "schedule.stage2_steps": "steps of stage 2",
    "data.batch_size": "pairs in a batch",
    "optimizer.name": "optimizer",
    "optimizer.lr": "learning rate",
    "objective.anchor_weight": "anchor weight λ₂",
    "objective.temperature": "temperature τ",
    "dro.set": "set of p",
    "dro.radius": "radius ρ",
    "dro.ascent": "step of p",
    "dro.step_size": "step size η",
    "dro.evaluate_on": "losses that move p",
    "dro.apply": "weights act on",
    "data.image_size": "image side",
    "data.text_length": "tokens of a text",
    "run.seed": "seed",
}


def context(files: RunFiles) -> dict[str, Any]:
    """What the template shows, except for the examples."""
    lines, ids = files.lines, files.client_ids
    state, reason = files.state()
    val = last_val(lines)
    return {
        "name": files.path.resolve().name,
        "path": str(files.path),
        "state": state,
        "reason": reason,
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "rounds_done": files.rounds_done,
        "num_rounds": files.num_rounds,
        "strategy": files.get("strategy.name"),
        "lines": lines,
        "client_ids": ids,
        "tiles": tiles(files, val),
        "sentences": sentences(files, val),
        "charts": charts(files) if lines else {},
        "clients": client_rows(files, val),
        "bars": recall_bars(files, val),
        "mean": mean_gallery([val[client] for client in ids if client in val]),
        "pooled": val.get("all"),
        "evaluation": evaluation(files),
        "transfer": transfer(files),
        "val_round": val_round(lines),
        "split": files.get("evaluation.split"),
        "excluded": [{"round": x["round"], **item} for x in lines for item in x["excluded_clients"]],
        "skipped": skipped_rows(lines),
        "skipped_steps": skipped_step_rows(lines),
        "clipped": clipped_rows(lines),
        "costs": cost_rows(lines),
        "train_mean": mean_of(lines[-1].get("client_train_losses")) if lines else None,
        "facts": [
            (label, shown(files.get(key)), key) for key, label in KEY_FACTS.items() if files.get(key) is not None
        ],
        "config": yaml.safe_dump(files.config, sort_keys=False, allow_unicode=True),
        "resume": files.resume_command(),
    }


def last_val(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The retrieval results of the last round that has any; {} where none has."""
    return next((line["val"] for line in reversed(lines) if line.get("val")), {})


def val_round(lines: list[dict[str, Any]]) -> int | None:
    """The round of last_val."""
    return next((line["round"] for line in reversed(lines) if line.get("val")), None)


def tiles(files: RunFiles, val: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers at the top of the page: value, what it is, and what to compare it with."""
    lines = files.lines
    if not lines:
        return []
    first, last = lines[0], lines[-1]
    out = []
    for key, label in (("mean_loss", "mean loss"), ("worst_loss", "worst client's loss")):
        if last[key] is not None:
            against = f"from {number(first[key])}" if len(lines) > 1 and first[key] is not None else "after one round"
            out.append(
                {
                    "value": number(last[key]),
                    "label": label,
                    "against": f"{against}; chance {number(chance_loss(files))}",
                }
            )
    known = [x for x in last["client_losses"] if x is not None]
    if len(known) > 1:
        spread = max(known) - min(known)
        out.append({"value": number(spread), "label": "spread of the losses", "against": "worst − best client"})
    gain = last.get("robust_gain")
    if gain and gain["share"] is not None:
        against = f"Σ p L {number(gain['mixture'])}; mean {number(gain['mean'])}, at most {number(gain['best'])}"
        out.append({"value": f"{percent(gain['share'])} %", "label": "of the robust gain attained", "against": against})
    pooled = val.get("all") or (next(iter(val.values())) if len(val) == 1 else None)
    recall = both_ways(pooled, 5) if pooled else None
    if pooled and recall is not None:
        times = recall / pooled["chance@5"]
        out.append(
            {
                "value": f"{percent(recall)} %",
                "label": "recall@5, one gallery",
                "against": f"chance {percent(pooled['chance@5'])} % (× {times:.1f}), {pooled['pairs']:g} pairs",
            }
        )
    seconds = sum(line["seconds"] for line in lines)
    pairs = sum(line["samples"] for line in lines)
    out.append({"value": duration(seconds), "label": "in all rounds", "against": f"{pairs:,} pairs trained on"})
    return out


def chance_loss(files: RunFiles) -> float | None:
    """L_i of a model that knows nothing, as the run's objective says it; None where that is a class that is not here."""
    objective, batch_size = objective_of(files), files.get("dro.evaluation_batch_size")
    return None if objective is None or batch_size is None else objective.chance(int(batch_size))


def sentences(files: RunFiles, val: dict[str, Any]) -> list[str]:
    """What happened, in words."""
    lines, ids = files.lines, files.client_ids
    if not lines:
        return ["No round has ended yet, so there is nothing to show but the config."]
    last, out = lines[-1], []
    known = {c: x for c, x in zip(ids, last["client_losses"], strict=True) if x is not None}
    if len(known) > 1:
        worst, best = max(known, key=lambda c: known[c]), min(known, key=lambda c: known[c])
        out.append(f"{worst} has the highest loss ({number(known[worst])}), {best} the lowest ({number(known[best])}).")
        p = last.get("next_client_weights") or last["client_weights"]
        heavy, light = (ids[f(range(len(ids)), key=lambda i: p[i])] for f in (max, min))
        if max(p) - min(p) > 1e-6:
            out.append(
                f"The weights p now range from {min(p):.3f} ({light}) to {max(p):.3f} ({heavy}); "
                f"their distance from uniform is {robust_weights.chi2_divergence(p):.3f}{_at_most(files)}."
            )
        else:
            out.append("All clients have the same weight.")
        gain = gain_in_words(last.get("robust_gain"))
        if gain:
            out.append(gain)
    gained = {}
    for client, about in val.items():
        recall = both_ways(about, 5)
        if client != "all" and recall is not None:
            gained[client] = recall - about["chance@5"]
    if len(gained) > 1:
        least = min(gained, key=lambda c: gained[c])
        above = sum(g > 0 for g in gained.values())
        out.append(
            f"Recall@5 is higher than a random order's for {above} of {len(gained)} clients with a large enough gallery, by "
            f"luck or not (intervals are below); it is lowest against it for {least}."
        )
    excluded = sorted({item["id"] for line in lines for item in line["excluded_clients"]})
    if excluded:
        out.append(f"Left out of the average in some round: {', '.join(excluded)} (reasons below).")
    return out


def _at_most(files: RunFiles) -> str:
    """The bound on the weights' χ² distance from uniform, where the run's set is a ball of that distance."""
    inside = set_of(files, robust_weights.uniform_center(len(files.client_ids)))
    is_ball = inside.kind == "chi2" and files.get("dro.center") == "uniform"
    return f", of at most ρ = {inside.radius:g}" if is_ball else ""


def charts(files: RunFiles) -> dict[str, Markup]:
    """The page's charts by name; those that would say nothing are left out."""
    lines, ids = files.lines, files.client_ids
    x = [line["round"] for line in lines]
    style = styles(files)
    column: Callable[[str, int], list[float | None]] = lambda key, i: [line[key][i] for line in lines]
    losses = [
        Series(client, column("client_losses", i), style[client], labelled=style[client] != "muted")
        for i, client in enumerate(ids)
    ]
    if len(ids) > 1:
        losses.append(Series("worst", [line["worst_loss"] for line in lines], "ink", dash=True))
        losses.append(Series("mean", [line["mean_loss"] for line in lines], "ink"))
    unknowing = chance_loss(files)
    level = [] if unknowing is None else [("chance", unknowing)]
    out = {"loss": line_chart(losses, x, title="Loss per client over rounds", show=number, references=level)}
    if len(ids) > 1:
        weights = [line["client_weights"] for line in lines]
        after = lines[-1].get("next_client_weights")
        px = [*x, x[-1] + 1] if after else x
        weights = [*weights, after] if after else weights
        p = [
            Series(client, [w[i] for w in weights], style[client], labelled=style[client] != "muted")
            for i, client in enumerate(ids)
        ]
        even = [("uniform", 1 / len(ids))]
        out["weights"] = line_chart(
            p, px, title="Weights p over rounds", show=lambda v: f"{v:.2f}", from_zero=True, references=even
        )
    gained = [(line["round"], line["robust_gain"]) for line in lines if line.get("robust_gain")]
    if gained and len(ids) > 1:
        names = (("worst p allowed", "best", "c1", True), ("Σ p L", "mixture", "c0", False))
        values = [Series(label, [g[key] for _, g in gained], style, dash=dash) for label, key, style, dash in names]
        values.append(Series("mean", [g["mean"] for _, g in gained], "ink"))
        out["gain"] = line_chart(values, [r for r, _ in gained], title="Robust gain over rounds", show=number)
    pooled = [(line["round"], line["val"]["all"]) for line in lines if (line.get("val") or {}).get("all")]
    if pooled:
        cuts = [k for k in RECALL_AT if f"chance@{k}" in pooled[-1][1]]
        recall = [Series(f"recall@{k}", [both_ways(v, k) for _, v in pooled], f"t{j}") for j, k in enumerate(cuts)]
        chance = [
            Series(f"chance@{k}", [v.get(f"chance@{k}") for _, v in pooled], f"t{j}", dash=True)
            for j, k in enumerate(cuts)
        ]
        out["recall"] = line_chart(
            [*recall, *chance],
            [r for r, _ in pooled],
            title="Recall in the pooled gallery over rounds",
            show=lambda v: f"{percent(v)} %",
            from_zero=True,
        )
    stages = [(label, [float(line["stage_seconds"].get(key, 0.0)) for line in lines]) for key, label in STAGES.items()]
    out["seconds"] = stacked_bars(stages, x, title="Seconds per stage of each round", unit="s")
    return out


def shown(value: Any) -> str:
    """A config value for reading."""
    return f"{value:g}" if isinstance(value, float) else str(value)
