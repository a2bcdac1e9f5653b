"""Two models on the same pairs: differences with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from feddra_ds.evaluation.gallery import Gallery
from feddra_ds.evaluation.retrieval import join
from feddra_ds.evaluation.verdict import POOLED
from feddra_ds.evaluation.zero_shot import Scored
from feddra_ds.metrics.classification import auroc_draws, measure
from feddra_ds.metrics.intervals import paired_bootstrap


def compare_retrieval(
    first: Mapping[str, Gallery],
    second: Mapping[str, Gallery],
    held_out: Sequence[str],
    *,
    one_model: bool,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """{client or pooled: {recall@k: {first, second, difference, low, high}}}, difference = first − second, the mean of both
    ways, with 95 % intervals from resamplings of whole patients (or texts) that both models share.

    Raises ValueError where the galleries are not of the same pairs.
    """
    for client, gallery in first.items():
        if client not in second or second[client].keys != gallery.keys:
            raise ValueError(f"--compare: the two models do not read the same pairs of {client}")
    searched = [{name: of[name] for name in first} for of in (first, second)]
    inside = [name for name in first if name not in held_out]
    if one_model and len(inside) > 1:
        for one in searched:
            one[POOLED] = join([one[name] for name in inside])
    out: dict[str, Any] = {}
    for name, gallery in searched[0].items():
        ranks = [one[name].ranks for one in searched]
        out[name] = {}
        for k in ranks[0].cutoffs:
            hits = [found.hits("mean", k) for found in ranks]
            low, high = paired_bootstrap(hits[0], hits[1], gallery.groups, draws=draws, seed=seed)
            out[name][f"recall@{k}"] = _told(float(hits[0].mean()), float(hits[1].mean()), low, high)
    return out


def compare_zero_shot(
    first: Sequence[Scored], second: Sequence[Scored], groups: Sequence[str], *, draws: int, seed: int
) -> dict[str, Any]:
    """{label: {first, second, difference, low, high}} of the AUROC over all pairs, from the same resamplings of groups."""
    out: dict[str, Any] = {}
    for a, b in zip(first, second, strict=True):
        targets = a.task.targets
        measured = [measure(targets, one.scores) for one in (a, b)]
        if measured[0] is None or measured[1] is None:
            continue
        drawn = [auroc_draws(targets, one.scores, groups, draws, seed) for one in (a, b)]
        low, high = np.nanquantile(drawn[0] - drawn[1], (0.025, 0.975))
        out[a.task.name] = _told(measured[0]["auroc"], measured[1]["auroc"], float(low), float(high))
    return out


def _told(first: float, second: float, low: float, high: float) -> dict[str, float]:
    return {"first": first, "second": second, "difference": first - second, "low": low, "high": high}
