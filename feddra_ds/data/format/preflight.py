"""Everything in a dataset that would stop training, found before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.find import DATASET_NAME, INDEX_NAME


def preflight(
    dataset: Dataset,
    ids: Sequence[str] | None,
    *,
    batch_size: int,
    eval_batch_size: int,
    loss_split: str = "train",
    eval_split: str | None,
    verify: bool,
    pooled: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Everything that would stop training, a line each, beginning with the config key or the file.

    ids: the clients that are to be trained on (`dataset.choose` takes the same); None for all but the held-out.
    batch_size, eval_batch_size: data.batch_size and dro.evaluation_batch_size. loss_split: the split of the losses that
    move p. eval_split: the split that retrieval is measured on, or None when it never is. pooled: the clients' pairs count
    together (the centralised strategy).
    Reads files only; needs no process group.
    """
    wanted = dataset.wanted(ids)
    problems = dataset.missing(wanted)
    if ids is None:
        problems += lost_folders(dataset)
    if not wanted:
        problems.append(f"clients.ids: {dataset.address} has no client to train on")
    counts: dict[str, int] = {}
    without_split = []
    for client in (c for c in wanted if c in dataset.clients):
        try:
            problems += _shard_problems(dataset, client) if dataset.store is None else []
            counts[client] = dataset.num_samples(client, "train")
            if eval_split is not None and not dataset.num_samples(client, eval_split):
                without_split.append(client)
            if verify:
                known = " ".join(problems)
                problems += [p for p in dataset.verify([client], progress) if p.split(":")[0] not in known]
        except DataError as error:
            problems += error.problems
    judged = counts if loss_split == "train" else {c: dataset.num_samples(c, loss_split) for c in counts}
    if pooled:
        counts, judged = ({"+".join(x): sum(x.values())} if x else {} for x in (counts, judged))
    small = [client for client, count in counts.items() if count < batch_size]
    if small:
        problems.append(f"data.batch_size: fewer train pairs than a batch of {batch_size}: {_with(counts, small)}; "
                        f"lower data.batch_size, or leave them out with clients.ids{_kept_out(dataset, small)}")  # fmt: skip
    few = [client for client, count in judged.items() if count < eval_batch_size and client not in small]
    if few:
        least = min(judged[client] for client in few)
        other = "" if loss_split == "train" else ", or dro.evaluate_on to train"
        problems.append(f"dro.evaluation_batch_size: fewer {loss_split} pairs than {eval_batch_size}: "
                        f"{_with(judged, few)}; set it to {least} or less{other}")  # fmt: skip
    if without_split:
        problems.append(f"evaluation.split: no {eval_split} split: {listed(without_split)}; "
                        "convert with --val-fraction, or set evaluation.every=0")  # fmt: skip
    return problems


def _kept_out(dataset: Dataset, clients: Sequence[str]) -> str:
    """What to do where the pairs that are missing are those that dro.evaluate_on=val keeps out of training."""
    kept = [client for client in clients if client in dataset.without_val]
    return f", or set dro.evaluate_on=train, as {listed(kept)}, without a val split, keep pairs for val" if kept else ""


def _with(counts: dict[str, int], clients: Sequence[str]) -> str:
    return listed([f"{client} ({counts[client]})" for client in clients])


def lost_folders(dataset: Dataset) -> list[str]:
    """A line where dataset.json names clients that have no folder any more."""
    named = dict.fromkeys([*dataset.info.get("clients", []), *dataset.info.get("held_out", [])])
    lost = [client for client in named if client not in dataset.clients]
    if not lost:
        return []
    return [
        f"data.root: {dataset.address}/{DATASET_NAME} names {listed(lost)}, but there is no such folder with an {INDEX_NAME}; "
        "bring it back, or say with clients.ids who takes part"
    ]


def _shard_problems(dataset: Dataset, client: str) -> list[str]:
    """A missing, empty or half-written shard, each with its file."""
    problems = []
    for path, shard in dataset.shards(client):
        if not path.is_file():
            problems.append(f"{path}: is missing, though {INDEX_NAME} lists it with {shard['samples']} samples")
        elif (size := path.stat().st_size) != shard["bytes"]:
            state = "is empty" if size == 0 else "was half written or changed"
            problems.append(
                f"{path}: {state}: {size} bytes, not {shard['bytes']} as in {INDEX_NAME}; convert {client} again"
            )
        elif not shard["samples"]:
            problems.append(f"{path}: is an empty shard, with no samples; convert {client} again")
    return problems
