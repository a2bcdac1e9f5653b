"""Zero-shot classification by the names of the labels.

Legend: n pairs, C classes, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.evaluation.gallery import Gallery, embed_texts
from feddra_ds.evaluation.labels import Task, find_tasks
from feddra_ds.evaluation.models import Models
from feddra_ds.evaluation.verdict import POOLED
from feddra_ds.metrics.classification import measure


def classify(models: Models, galleries: dict[str, Gallery]) -> tuple[dict[str, Any], dict[str, str]]:
    """{label: {pooled: measures, clients: {client: measures}, classes: their number}}, and the labels left out with the
    reason, for every label in the samples' json."""
    infos = [info for gallery in galleries.values() for info in gallery.infos]
    tasks, refused = find_tasks(infos)
    out: dict[str, Any] = {}
    starts = np.cumsum([0, *(len(g) for g in galleries.values())])
    for task in tasks:
        scores = []
        for client, gallery in galleries.items():
            model, processor = models.of(client)
            scores.append(zero_shot_scores(task, gallery.image, lambda texts: embed_texts(model, processor, texts)))  # noqa: B023
        measured = {
            client: measure(task.targets[a:b], s)
            for client, s, a, b in zip(galleries, scores, starts[:-1], starts[1:], strict=True)
        }
        pooled = measure(task.targets, np.concatenate(scores))
        if pooled is None:
            refused[task.name] = "only one of its classes occurs in this split"
        else:
            out[task.name] = {POOLED: pooled, "clients": measured, "classes": len(task.classes)}
    return out, refused


def zero_shot_scores(
    task: Task, image: NDArray[np.float32], embed: Callable[[list[str]], NDArray[np.float32]]
) -> NDArray[np.float64]:
    """(n, C) cosine similarity of images (n, D), unit norm, to each class's mean prompt embedding."""
    prompts = task.prompts()
    rows = embed([p for one in prompts for p in one]).astype(np.float64)
    means = np.stack([block.mean(0) for block in np.split(rows, np.cumsum([len(p) for p in prompts])[:-1])])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return image.astype(np.float64) @ means.T
