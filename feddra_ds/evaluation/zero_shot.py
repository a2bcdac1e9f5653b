"""Zero-shot classification by the names of the labels, or by prompts that are given.

Legend: n pairs, C classes, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.common.text import listed
from feddra_ds.evaluation.gallery import Gallery, embed_texts
from feddra_ds.evaluation.labels import Prompts, Task, find_tasks
from feddra_ds.evaluation.models import Models
from feddra_ds.evaluation.verdict import POOLED
from feddra_ds.metrics.classification import auroc_interval, calibration, measure


@dataclass(frozen=True)
class Scored:
    """A label's task over the pairs of all galleries, in their order, with scores (n, C), and the models' temperature."""

    task: Task
    scores: NDArray[np.float64]
    temperature: float


def score(
    models: Models, galleries: Mapping[str, Gallery], prompts: Prompts | None = None
) -> tuple[list[Scored], dict[str, str]]:
    """Every label of the samples' json, scored by each client's model; and the labels left out with the reason.

    prompts: label → class → prompts, instead of the label's names. Raises ValueError where they do not fit the labels.
    """
    tasks, refused = find_tasks([info for gallery in galleries.values() for info in gallery.infos])
    there = [task.name for task in tasks]
    if unknown := [label for label in prompts or {} if label not in there and label not in refused]:
        raise ValueError(f"--prompts: no label {listed(unknown)}; there are: {', '.join(there) or 'none'}")
    texts = {task.name: task.prompts(prompts) for task in tasks}
    scores: dict[str, list[NDArray[np.float64]]] = {task.name: [] for task in tasks}
    for client, gallery in galleries.items():
        model, processor = models.of(client)
        embed = lambda some: embed_texts(model, processor, some)  # noqa: B023
        for task in tasks:
            scores[task.name].append(zero_shot_scores(texts[task.name], gallery.image, embed))
    temperature = float(np.mean([gallery.temperature for gallery in galleries.values()]))
    return [Scored(task, np.concatenate(scores[task.name]), temperature) for task in tasks], refused


def classify(
    scored: Sequence[Scored],
    galleries: Mapping[str, Gallery],
    subgroups: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    *,
    draws: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, str]]:
    """{label: {pooled: measures, clients: {client: measures}, subgroups: {field: {value: measures}}, classes: their number}},
    and the labels left out with the reason. subgroups: field → value → (n,) which pairs have it. draws: of the intervals."""
    groups = [key for gallery in galleries.values() for key in gallery.groups]
    ends = np.cumsum([len(g) for g in galleries.values()])
    place = np.arange(len(groups))
    of_client = {
        c: (place >= end - len(g)) & (place < end) for (c, g), end in zip(galleries.items(), ends, strict=True)
    }
    out: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for one in scored:
        measured = lambda chosen: _measure(one, chosen, groups, draws, seed)  # noqa: B023
        pooled = measured(np.ones(len(groups), dtype=np.bool_))
        if pooled is None:
            refused[one.task.name] = "only one of its classes occurs in this split"
            continue
        out[one.task.name] = {
            POOLED: pooled,
            "clients": {client: measured(chosen) for client, chosen in of_client.items()},
            "subgroups": {
                field: {value: measured(chosen) for value, chosen in values.items()}
                for field, values in subgroups.items()
            },
            "classes": len(one.task.classes),
        }
    return out, refused


def _measure(
    one: Scored, chosen: NDArray[np.bool_], groups: Sequence[str], draws: int, seed: int
) -> dict[str, Any] | None:
    targets, scores = one.task.targets[chosen], one.scores[chosen]
    found = measure(targets, scores)
    if found is None:
        return None
    own = [groups[i] for i in np.flatnonzero(chosen).tolist()]
    interval = auroc_interval(targets, scores, own, draws=draws, seed=seed)
    low, high = interval or (None, None)
    told = calibration(targets, scores, one.temperature) if np.isfinite(one.temperature) else None
    return found | {"auroc_low": low, "auroc_high": high, "calibration": told}


def zero_shot_scores(
    prompts: Sequence[Sequence[str]], image: NDArray[np.float32], embed: Callable[[list[str]], NDArray[np.float32]]
) -> NDArray[np.float64]:
    """(n, C) cosine similarity of images (n, D), unit norm, to each class's mean prompt embedding."""
    rows = embed([p for one in prompts for p in one]).astype(np.float64)
    means = np.stack([block.mean(0) for block in np.split(rows, np.cumsum([len(p) for p in prompts])[:-1])])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    with np.errstate(invalid="ignore"):
        return image.astype(np.float64) @ means.T
