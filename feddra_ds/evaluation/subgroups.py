"""Subgroups of the pairs by a field of their json, such as age, sex or scanner, and how each is served.

Legend: n pairs over all galleries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.evaluation.gallery import Gallery, value_of
from feddra_ds.evaluation.labels import MAX_CLASSES
from feddra_ds.evaluation.retrieval import Estimate, join
from feddra_ds.metrics.intervals import bootstrap
from feddra_ds.metrics.ranking import RECALL_AT

MAX_VALUES = 8  # numbers of more values than these are cut at their quartiles
MIN_PAIRS = 10  # of a subgroup that may be the worst
Masks = dict[str, NDArray[np.bool_]]


def find_subgroups(infos: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, Masks]:
    """field → value → (n,) which pairs have it. A field is looked up in a pair's json, else among its labels.

    Numbers of more than MAX_VALUES values are cut at their quartiles: `45 to 61`. Raises ValueError for a field that no
    pair has, or that has more than MAX_CLASSES other values.
    """
    out = {}
    for field in fields:
        values = [value_of(info, field) for info in infos]
        if all(value is None for value in values):
            there = {key for info in infos for key, value in info.items() if not isinstance(value, (dict, list))}
            there |= {key for info in infos if isinstance(info.get("labels"), dict) for key in info["labels"]}
            raise ValueError(
                f"--subgroup: no sample has a field {field}; there are: {', '.join(sorted(there)) or 'none'}"
            )
        out[field] = _masks(field, values)
    return out


def _masks(field: str, values: Sequence[str | None]) -> Masks:
    known = sorted({value for value in values if value is not None})
    if len(known) > MAX_VALUES:
        try:
            return _quartiles(np.array([np.nan if value is None else float(value) for value in values]))
        except ValueError as error:  # words
            if len(known) > MAX_CLASSES:
                raise ValueError(
                    f"--subgroup: {field} has {len(known)} values that are no numbers, more than {MAX_CLASSES} subgroups"
                ) from error
    return {one: np.array([value == one for value in values]) for one in known}


def _quartiles(numbers: NDArray[np.float64]) -> Masks:
    edges = np.unique(np.nanquantile(numbers, (0, 0.25, 0.5, 0.75, 1)))
    out = {}
    for i, (low, high) in enumerate(pairwise(edges.tolist())):
        last = i == len(edges) - 2
        name = f"{low:g} to {high:g}" if last else f"{low:g} to under {high:g}"
        out[name] = (numbers >= low) & ((numbers <= high) if last else (numbers < high))
    return out


def measure_subgroups(
    galleries: Mapping[str, Gallery],
    held_out: Sequence[str],
    subgroups: Mapping[str, Masks],
    *,
    one_model: bool,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """{fields: {field: {value: {pairs, recall@k: …}}}, worst: {field, value, …}}: recall of a subgroup's queries, as
    `measure_retrieval` has it: in the pooled gallery of those that are not held out, and each held-out client's own.

    worst: the least recall@5 beyond chance among subgroups of MIN_PAIRS pairs; None where there is none.
    """
    hits, chance, groups = _by_pair(galleries, held_out, one_model)
    fields: dict[str, Any] = {}
    worst: dict[str, Any] | None = None
    for field, masks in subgroups.items():
        fields[field] = {}
        for value, chosen in masks.items():
            about: dict[str, Any] = {"pairs": int(chosen.sum())}
            for k in RECALL_AT:
                rows = np.flatnonzero(chosen & ~np.isnan(hits[k]))
                if len(rows):
                    of_k = hits[k][rows]
                    low, high = bootstrap(of_k, [groups[i] for i in rows], draws=draws, seed=seed)
                    estimate = Estimate(k, float(of_k.mean()), low, high, float(chance[k][rows].mean()))
                    about[f"recall@{k}"] = asdict(estimate) | {"verdict": estimate.verdict}
            fields[field][value] = about
            five = about.get("recall@5")
            if five and about["pairs"] >= MIN_PAIRS:
                beyond = (five["recall"] - five["chance"]) / (1 - five["chance"])
                if worst is None or beyond < worst["skill@5"]:
                    worst = {"field": field, "value": value, "skill@5": beyond, **five}
    return {"fields": fields, "worst": worst}


def _by_pair(
    galleries: Mapping[str, Gallery], held_out: Sequence[str], one_model: bool
) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[np.float64]], list[str]]:
    """By k: (n,) hits of both ways and their chance, nan where a gallery is too small for k; and n keys of groups."""
    inside = [name for name in galleries if name not in held_out]
    together = one_model and len(inside) > 1
    shelves = [inside] if together else [[name] for name in inside]
    shelves += [[name] for name in galleries if name in held_out]
    ends = dict(zip(galleries, np.cumsum([len(g) for g in galleries.values()]).tolist(), strict=True))
    n = sum(map(len, galleries.values()))
    hits, chance = ({k: np.full(n, np.nan) for k in RECALL_AT} for _ in range(2))
    for names in shelves:
        found = (galleries[names[0]] if len(names) == 1 else join([galleries[name] for name in names])).ranks
        rows = np.concatenate([np.arange(ends[name] - len(galleries[name]), ends[name]) for name in names])
        for k in found.cutoffs:
            hits[k][rows], chance[k][rows] = found.hits("mean", k), found.chance(k)
    return hits, chance, [key for gallery in galleries.values() for key in gallery.groups]
