"""What a finished run is measured by: the numbers of a row.

Over the clients that were trained on, on the split that the spec names; recall is the mean of both directions:

    recall@1, recall@5                     mean over the clients
    worst_recall@1, worst_recall@5         the least of them
    spread_recall@5                        most − least
    pooled_recall@1, pooled_recall@5       all clients' pairs in one gallery
    held_out_recall@1, held_out_recall@5   mean over the sites that nobody trained on
    loss, worst_loss                       L_i of the split, in batches of dro.evaluation_batch_size: mean and largest
    train_loss, worst_train_loss           L_i of training pairs, as the run's last round measured it
    worst_mixture_loss, worst_mixture_…    what `evaluate` says of the worst mixture
    largest_p, robust_gain_share           the weights p after the last round
    mb_sent                                10^6 bytes that a rank sent to its peers in the last round
    recall@5/CLIENT, loss/CLIENT, p/CLIENT one client's
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from feddra_ds.evaluation import finite
from feddra_ds.evaluation.mixture import DEFAULT_SET
from feddra_ds.experiments.spec import EvaluateSpec

Metrics = dict[str, float]


def measure(run_dir: Path, how: EvaluateSpec, rounds: list[dict[str, Any]]) -> Metrics:
    """The metrics of a finished run; rounds: the lines of its metrics.jsonl. Raises DataError, and ValueError, as where
    weights or embeddings are not finite."""
    from feddra_ds.evaluation.evaluate import evaluate

    local = not (run_dir / "model" / "config.json").is_file()  # a model per client: held-out sites have none
    clients = list(rounds[-1]["client_ids"]) if local else None
    result = evaluate(
        run_dir,
        split=how.split,
        clients=clients,
        max_pairs=how.max_pairs,
        batch_size=how.batch_size,
        bootstrap=1,
        zero_shot=False,
        worst_over=DEFAULT_SET,  # one set for all arms, whatever theirs are
    )
    if result["non_finite"]:
        raise ValueError("; ".join(finite.in_words(result["non_finite"])))
    return {
        **retrieval_metrics(result),
        **loss_metrics(result),
        **mixture_metrics(result),
        **round_metrics(rounds[-1]),
    }


def recall(about: Mapping[str, Any], k: int) -> float | None:
    """Recall@k of a gallery, the mean of both directions."""
    both = [about.get(f"{direction}_recall@{k}") for direction in ("i2t", "t2i")]
    return None if None in both else float(sum(both)) / 2  # type: ignore[arg-type]


def retrieval_metrics(result: Mapping[str, Any]) -> Metrics:
    """Of what `evaluate` returns."""
    out: Metrics = {}
    for k in (1, 5):
        found = {c: recall(about, k) for c, about in result["clients"].items()}
        known = {c: value for c, value in found.items() if value is not None}
        inside = [value for c, value in known.items() if not result["clients"][c]["held_out"]]
        outside = [value for c, value in known.items() if result["clients"][c]["held_out"]]
        out |= {f"recall@{k}/{c}": value for c, value in known.items()}
        if inside:
            out |= {f"recall@{k}": float(np.mean(inside)), f"worst_recall@{k}": min(inside)}
            out[f"spread_recall@{k}"] = max(inside) - min(inside)
        if outside:
            out[f"held_out_recall@{k}"] = float(np.mean(outside))
        if result.get("pooled") and (pooled := recall(result["pooled"], k)) is not None:
            out[f"pooled_recall@{k}"] = pooled
    return out


def loss_metrics(result: Mapping[str, Any]) -> Metrics:
    """Of L_i by client, which `evaluate` measures beside the worst mixture."""
    losses: dict[str, float] = (result.get("worst_mixture") or {}).get("losses", {})
    inside = [value for c, value in losses.items() if not result["clients"][c]["held_out"]]
    out = {f"loss/{c}": value for c, value in losses.items()}
    return out | ({"loss": float(np.mean(inside)), "worst_loss": max(inside)} if inside else {})


def mixture_metrics(result: Mapping[str, Any]) -> Metrics:
    """The numbers of `evaluate`'s worst mixture, where it has one."""
    told = result.get("worst_mixture")
    numbers = told.items() if isinstance(told, dict) else ()
    return {f"worst_mixture_{k}": float(v) for k, v in numbers if isinstance(v, (int, float))}


def round_metrics(line: Mapping[str, Any]) -> Metrics:
    """Of a line of metrics.jsonl: p after the round, the losses that moved it, the share of the robust gain, bytes."""
    weights = line.get("next_client_weights") or line["client_weights"]
    out = {f"p/{c}": float(p) for c, p in zip(line["client_ids"], weights, strict=True)}
    out["largest_p"] = max(out.values())
    memorised = [x for x in line.get("client_train_losses") or [] if x is not None]
    losses = memorised or [x for x in line["client_losses"] if x is not None]  # where L_i is of training pairs itself
    if losses:
        out |= {"train_loss": float(np.mean(losses)), "worst_train_loss": max(losses)}
    if "bytes_sent_per_rank" in line:
        out["mb_sent"] = line["bytes_sent_per_rank"] / 1e6
    gain = (line.get("robust_gain") or {}).get("share")
    return out | ({"robust_gain_share": float(gain)} if isinstance(gain, (int, float)) else {})
