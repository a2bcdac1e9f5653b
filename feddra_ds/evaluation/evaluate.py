"""One call that measures a trained model: what `feddra-ds evaluate --json` prints, as a dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from feddra_ds.data.format.dataset import Dataset
from feddra_ds.distributed.shares import ALONE, World
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.compare import compare_retrieval, compare_zero_shot
from feddra_ds.evaluation.embeddings import Embeddings, check_path, save
from feddra_ds.evaluation.gallery import Gallery
from feddra_ds.evaluation.labels import read_prompts
from feddra_ds.evaluation.mixture import DEFAULT_SET, measure_mixture, named_set
from feddra_ds.evaluation.models import Models, open_models
from feddra_ds.evaluation.opened import open_for
from feddra_ds.evaluation.retrieval import measure_retrieval
from feddra_ds.evaluation.subgroups import Masks, find_subgroups, measure_subgroups
from feddra_ds.evaluation.zero_shot import Scored, classify, score


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
    match_by: str = "match",
    subgroups: Sequence[str] = (),
    prompts: str | Path | None = None,
    compare: str | Path | None = None,
    save_embeddings: str | Path | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Retrieval of each client and of all in one gallery, with chance and intervals, the clients' worst mixture, and
    zero-shot classification.

    path: a run's folder, its model/, or an exported model. data: folder of shards (None: the run's data.root). clients:
    those to look at (None: all, the held-out ones too). device: auto, cpu or cuda. max_pairs: most pairs of a client
    (None: all). num_workers: decoding processes. bootstrap: resamplings of the intervals. shuffled_texts: the control,
    with the texts in random orders and without zero-shot and mixture; `control_at_chance` of the result says how it went.
    worst_over: where the worst mixture is looked for, such as chi2:1, kl:0.5, cvar:1 or simplex (None: where the run's p
    may move, or chi2:1 where that is one mixture alone), so that runs of different sets can be compared. ema: measure the
    run's average over rounds (aggregate.ema) in place of its global model. match_by: the field of the samples' json whose
    equal values make pairs of a client matches of each other, such as a study. subgroups: fields of the json, such as age
    or sex, by whose values pairs are measured apart. prompts: a file of zero-shot prompts (labels.read_prompts). compare:
    a second run or model, measured on the same pairs. save_embeddings: a .safetensors or .parquet file to write. world: the
    ranks of a launch (shares.launched_world), each of which embeds a share of the batches; the first measures, others return {}.

    Returns a dict that json.dumps takes; docs/json_output.md says what is in it. Its `non_finite` names the weights and
    pairs that are not finite, {} for none: such pairs are found last, find their match last and count as wrongly
    classified. Writes nothing but save_embeddings; on a terminal it shows a bar. Raises ValueError, whose message names the
    option and what to do, and DataError for data that cannot be read.
    """
    named_set(worst_over or DEFAULT_SET, 1)  # a mistake in an option is told before minutes of embedding
    if shuffled_texts and (subgroups or prompts or compare):
        raise ValueError(
            "--shuffled-texts: takes no --subgroup, --prompts or --compare: it is a control of retrieval alone"
        )
    if prompts is not None and not zero_shot:
        raise ValueError("--prompts: is of zero-shot classification, which --no-zero-shot leaves out")
    out = None if save_embeddings is None else check_path(save_embeddings, "--save-embeddings")
    given = None if prompts is None else read_prompts(prompts)
    opened = open_for(
        path,
        data=data,
        split=split,
        clients=clients,
        device=device,
        max_pairs=max_pairs,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        ema=ema,
        world=world,
    )
    models, dataset = opened.models, opened.dataset
    other = None if compare is None else _open_second(compare, device, world.local_rank)

    def embedded(by: Models) -> dict[str, Gallery]:
        return {client: replace(gallery, match_by=match_by) for client, gallery in opened.galleries(by).items()}

    galleries, how = embedded(models), {"draws": bootstrap, "seed": seed}
    second = None if other is None else embedded(other)
    if not world.is_first:
        return {}
    masks = find_subgroups([info for gallery in galleries.values() for info in gallery.infos], subgroups)
    result: dict[str, Any] = opened.about
    result |= _retrieval(models, dataset, galleries, masks, shuffled_texts, worst_over, how)
    scored: list[Scored] = []
    if zero_shot and not shuffled_texts:
        scored, refused = score(models, galleries, given)
        result["zero_shot"], more = classify(scored, galleries, masks, **how)
        result["labels_left_out"] = refused | more
    result["non_finite"] = finite.of_evaluation(models, galleries)
    if other is not None and second is not None:
        again = score(other, second, given)[0] if scored else []
        result["compared"] = _comparison(models, other, dataset, galleries, second, scored, again, how)
    if out is not None:
        result["embeddings"] = str(save(Embeddings.of(galleries), out, str(models.source)))
    return result


def _open_second(path: str | Path, device: str, local_rank: int) -> Models:
    try:
        return open_models(path, device, local_rank=local_rank)
    except ValueError as error:
        raise ValueError(f"--compare: {error}") from error


def _retrieval(
    models: Models,
    dataset: Dataset,
    galleries: dict[str, Gallery],
    masks: dict[str, Masks],
    shuffled: bool,
    worst_over: str | None,
    how: dict[str, int],
) -> dict[str, Any]:
    held_out = models.held_out(dataset, list(galleries))
    result = measure_retrieval(galleries, held_out, one_model=models.shared, shuffled=shuffled, **how)
    result["without_split"] = [c for c in dataset.client_ids if c not in galleries]
    if not shuffled:
        pairs = {client: dataset.num_samples(client, "train") for client in galleries}
        result["worst_mixture"] = measure_mixture(galleries, held_out, models.run, pairs, worst_over=worst_over, **how)
        if masks:
            result["subgroups"] = measure_subgroups(galleries, held_out, masks, one_model=models.shared, **how)
    return result


def _comparison(
    models: Models,
    other: Models,
    dataset: Dataset,
    galleries: dict[str, Gallery],
    second: dict[str, Gallery],
    scored: list[Scored],
    again: list[Scored],
    how: dict[str, int],
) -> dict[str, Any]:
    held_out, one_model = models.held_out(dataset, list(galleries)), models.shared and other.shared
    groups = [key for gallery in galleries.values() for key in gallery.groups]
    return {
        "model": str(other.source),
        "retrieval": compare_retrieval(galleries, second, held_out, one_model=one_model, **how),
        "zero_shot": compare_zero_shot(scored, again, groups, **how),
        "non_finite": finite.of_evaluation(other, second),
    }
