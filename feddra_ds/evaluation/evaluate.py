"""One call that measures a trained model: what `feddra-ds evaluate --json` prints, as a dict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feddra_ds.evaluation.gallery import embed_clients, open_split
from feddra_ds.evaluation.mixture import DEFAULT_SET, measure_mixture, named_set
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
    worst_over: str | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Retrieval of each client and of all in one gallery, with chance and intervals, the clients' worst mixture, and
    zero-shot classification.

    path: a run's folder, its model/, or an exported model. data: folder of shards (None: the run's data.root). clients:
    those to look at (None: all, the held-out ones too). device: auto, cpu or cuda. max_pairs: most pairs of a client
    (None: all). num_workers: decoding processes. bootstrap: resamplings of the intervals. shuffled_texts: the control,
    with the texts in random orders and without zero-shot and mixture; `control_at_chance` of the result says how it went.
    worst_over: where the worst mixture is looked for, such as chi2:1, kl:0.5, cvar:1 or simplex (None: where the run's p
    may move, or chi2:1 where that is one mixture alone), so that runs of different sets can be compared. ema: measure the
    run's average over rounds (aggregate.ema) in place of its global model.

    Returns a dict that json.dumps takes. Writes nothing; on a terminal it shows a bar. Raises ValueError, whose message
    names the option and what to do, and DataError for data that cannot be read.
    """
    named_set(worst_over or DEFAULT_SET, 1)  # a mistake in it is told before minutes of embedding
    models = open_models(path, device, ema=ema)
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
    held_out = models.held_out(dataset, list(galleries))
    result: dict[str, Any] = {"model": str(models.source), "round": models.round, "data": root, "split": split}
    result["ema"] = ema
    result |= measure_retrieval(
        galleries,
        held_out,
        one_model=models.shared,
        draws=bootstrap,
        seed=seed,
        shuffled=shuffled_texts,
    )
    result["without_split"] = [c for c in dataset.client_ids if c not in galleries]
    if not shuffled_texts:
        pairs = {client: dataset.num_samples(client, "train") for client in galleries}
        result["worst_mixture"] = measure_mixture(
            galleries, held_out, models.run, pairs, worst_over=worst_over, draws=bootstrap, seed=seed
        )
    if zero_shot and not shuffled_texts:
        result["zero_shot"], result["labels_left_out"] = classify(models, galleries)
    return result
