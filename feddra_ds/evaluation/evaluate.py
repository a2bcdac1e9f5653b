"""One call that measures a trained model: what `feddra-ds evaluate --json` prints, as a dict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feddra_ds.evaluation.gallery import embed_clients, open_split
from feddra_ds.evaluation.models import open_models
from feddra_ds.evaluation.retrieval import measure_retrieval
from feddra_ds.evaluation.zero_shot import classify


def evaluate(
    path: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "val",
    clients: Sequence[str] | None = None,
    device: str = "auto",
    max_pairs: int | None = 2048,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    bootstrap: int = 1000,
    zero_shot: bool = True,
    shuffled_texts: bool = False,
) -> dict[str, Any]:
    """Retrieval of each client and of all in one gallery, with chance and intervals, and zero-shot classification.

    path: a run's folder, its model/, or an exported model. data: folder of shards (None: the run's data.root). clients:
    those to look at (None: all, the held-out ones too). device: auto, cpu or cuda. max_pairs: most pairs of a client
    (None: all). num_workers: decoding processes. bootstrap: resamplings of the intervals. shuffled_texts: the control,
    with the texts in random orders and without zero-shot; `control_at_chance` of the result says how it went.

    Returns a dict that json.dumps takes. Writes nothing; on a terminal it shows a bar. Raises ValueError, whose message
    names the option and what to do, and DataError for data that cannot be read.
    """
    models = open_models(path, device)
    root = models.data_root(None if data is None else str(data))
    dataset = open_split(models, root, split, clients)
    galleries = embed_clients(
        models,
        dataset,
        dataset.client_ids,
        split,
        max_pairs=max_pairs,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
    )
    result: dict[str, Any] = {"model": str(models.source), "round": models.round, "data": root, "split": split}
    result |= measure_retrieval(
        galleries,
        models.held_out(dataset, list(galleries)),
        one_model=models.shared,
        draws=bootstrap,
        seed=seed,
        shuffled=shuffled_texts,
    )
    result["without_split"] = [c for c in dataset.client_ids if c not in galleries]
    if zero_shot and not shuffled_texts:
        result["zero_shot"], result["labels_left_out"] = classify(models, galleries)
    return result
