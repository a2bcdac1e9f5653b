"""Embedded splits of a dataset: what trained models make of its pictures and texts.

Legend: n pairs, D embedding size, H width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feddra_ds.common.console import track
from feddra_ds.config.schema import AugmentConfig, DataConfig
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.distributed.shares import ALONE, World
from feddra_ds.evaluation.models import Models
from feddra_ds.metrics.ranking import Ranks, ranks
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.processor import DualEncoderProcessor


@dataclass(frozen=True)
class Gallery:
    """An embedded split of one client, in a seeded order: (n, D) fp32 unit-norm embeddings, (n,) int64 text ids, and the
    model's temperature.

    features: (n, H) fp32 image features before the head, or (n, 0) where they were not asked for. infos: the pairs'
    json members. match_by: the field of them by whose value pairs match each other. skipped: reason → number of unreadable
    pairs, which are left out.
    """

    client: str
    split: str
    image: NDArray[np.float32]
    text: NDArray[np.float32]
    text_ids: NDArray[np.int64]
    features: NDArray[np.float32]
    keys: list[str]
    infos: list[dict[str, Any]]
    skipped: dict[str, int]
    temperature: float
    match_by: str = "match"

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def non_finite(self) -> dict[str, list[str]]:
        """image, text → keys of the pairs whose embedding, or image features, are not finite; sides without any left out."""
        image = np.isfinite(self.image).all(1) & np.isfinite(self.features).all(1)
        sides = {"image": image, "text": np.isfinite(self.text).all(1)}
        return {side: [self.keys[i] for i in np.flatnonzero(~good)] for side, good in sides.items() if not good.all()}

    @property
    def match_ids(self) -> NDArray[np.int64]:
        """(n,) equal for pairs whose json has an equal value at `match_by`: they match each other. -1 without one."""
        numbers: dict[str, int] = {}
        told = [value_of(info, self.match_by) for info in self.infos]
        return np.array([-1 if m is None else numbers.setdefault(m, len(numbers)) for m in told], dtype=np.int64)

    @property
    def ranks(self) -> Ranks:
        """How the pairs are found among all of the gallery."""
        return ranks(self.image, self.text, self.text_ids, self.match_ids)

    @property
    def groups(self) -> list[str]:
        """A key for each pair: its patient where the json names one, else its text. Pairs of one key are not
        independent evidence."""
        return [
            f"{self.client}/{info['patient']}" if info.get("patient") else f"text {text}"
            for info, text in zip(self.infos, self.text_ids.tolist(), strict=True)
        ]


def value_of(info: Mapping[str, Any], name: str) -> str | None:
    """The value at `name` of a pair's json, else of its labels, as text; None where it is missing, empty, NaN or no single
    value."""
    labels = info.get("labels")
    value = info.get(name, labels.get(name) if isinstance(labels, dict) else None)
    if value is None or isinstance(value, (dict, list)) or value != value:  # NaN, which a table's gap may become
        return None
    return str(value).strip() or None


def open_split(models: Models, root: str, split: str, clients: Sequence[str] | None) -> Dataset:
    """The dataset and, as its client_ids, the clients to look at: those named, else those trained on, then the held-out.

    Raises ValueError where none of them has the split, and DataError where a named client is not there.
    """
    dataset = open_dataset(root, list(clients) if clients is not None else None, data=models.reading(root))
    if clients is None:
        trained = models.trained_on(dataset)
        first = dataset.client_ids if trained is None else trained
        dataset.client_ids = first + [c for c in dataset.held_out if c not in first]
    if all(split_of(dataset, client, split) is None for client in dataset.client_ids):
        have = sorted({name for client in dataset.client_ids for name in dataset.splits(client)})
        raise ValueError(f"--split: no client under {root} has a {split} split; there are: {', '.join(have) or 'none'}")
    return dataset


def split_of(dataset: Dataset, client: str, split: str) -> str | None:
    """`split` if the client has it; for `val` of a held-out client, which may have no other, else `test`. None for neither."""
    names = [split, "test"] if client in dataset.held_out and split == "val" else [split]
    return next((name for name in names if dataset.num_samples(client, name)), None)


def embed_clients(
    models: Models,
    dataset: Dataset,
    clients: Sequence[str],
    split: str,
    *,
    max_pairs: int | None,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    features: bool = False,
    world: World = ALONE,
) -> dict[str, Gallery]:
    """Embed the split (see split_of) of every client that has it; a bar on a terminal.

    world: each of its ranks embeds a share of every client's batches; the first has the galleries, the others {}.

    Raises DataError where more samples are unreadable than data.max_bad_fraction of the run (0.05 for an export).
    """
    max_bad = models.run.get("data.max_bad_fraction") if models.run is not None else None
    present = {c: name for c in clients if (name := split_of(dataset, c, split)) is not None}
    shown = track(present.items(), len(present), f"embedding {split}") if world.is_first else present.items()
    out = {}
    with DecodePool(num_workers) as pool:
        for client, part in shown:
            model, processor = models.of(client)
            settings = DataConfig(
                root=str(dataset.root),
                batch_size=world.size,
                image_size=processor.image_size,
                text_length=processor.text_length,
                num_workers=num_workers,
                augment=AugmentConfig(),
                max_bad_fraction=0.05 if max_bad is None else max_bad,
            )
            data = ClientData(
                dataset,
                [client],
                part,
                config=settings,
                seed=seed,
                tokenizer=processor.tokenizer,
                image_mean=processor.image_mean,
                image_std=processor.image_std,
                slot_rank=world.rank,
                ranks_per_slot=world.size,
                pool=pool,
            )
            shares = world.gather(lambda: _embed(model, data, max_pairs, batch_size, features))  # noqa: B023
            if shares is not None:
                for share in shares[1:]:
                    data.add_bad(share.bad)
                out[client] = _gallery(shares, dataset.samples(client, part), client, part, data.take_skipped())
    return out


@dataclass
class _Share:
    """What a rank makes of its share of a client's pairs, batch by batch. bad: samples that it could not read, and why."""

    image: list[NDArray[np.float32]] = field(default_factory=list)
    text: list[NDArray[np.float32]] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    text_ids: list[NDArray[np.int64]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    bad: dict[int | str, str] = field(default_factory=dict)
    temperature: float | None = None  # of no pairs


@torch.no_grad()
def _embed(model: DualEncoder, data: ClientData, max_pairs: int | None, batch_size: int, features: bool) -> _Share:
    device = next(model.parameters()).device
    share = _Share()
    with head_inputs(model) as seen:
        for batch in data.evaluation_batches(max_pairs, batch_size, whole_batches=True):
            share.keys += batch.keys
            share.text_ids.append(batch.text_ids.numpy())
            moved = batch.to(device)
            out = model(pixel_values=moved.pixel_values, input_ids=moved.input_ids, attention_mask=moved.attention_mask)
            share.image.append(out.image_embeds.cpu().numpy())
            share.text.append(out.text_embeds.cpu().numpy())
            share.temperature = float(out.temperature)
            pooled = seen.pop().float().cpu().numpy()
            share.features.append(pooled if features else np.zeros((len(pooled), 0), dtype=np.float32))
            seen.clear()
    share.bad = data.bad
    return share


def _gallery(shares: Sequence[_Share], samples: Samples, client: str, split: str, skipped: dict[str, int]) -> Gallery:
    """One of the ranks' shares, in their order."""
    keys = [key for share in shares for key in share.keys]
    # An unreadable pair is replaced by another, which may be in the gallery already: count each pair once.
    first = np.unique(np.array(keys), return_index=True)[1]
    first.sort()
    where = {key: index for index, key in enumerate(samples.keys)}
    kept = [keys[i] for i in first]
    infos = [info_of(samples, where[key]) for key in kept]
    samples.close()
    joined = lambda name: np.concatenate([x for share in shares for x in getattr(share, name)])[first]
    return Gallery(
        client=client,
        split=split,
        image=joined("image"),
        text=joined("text"),
        text_ids=joined("text_ids"),
        features=joined("features"),
        keys=kept,
        infos=infos,
        skipped=skipped,
        temperature=next(share.temperature for share in shares if share.temperature is not None),
    )


def info_of(samples: Samples, index: int) -> dict[str, Any]:
    """The pair's json member; {} where it is broken: the pair is measured all the same."""
    try:
        info = samples.read_info(index)
    except (ValueError, EOFError):
        return {}
    return info if isinstance(info, dict) else {}


@contextmanager
def head_inputs(model: DualEncoder) -> Iterator[list[torch.Tensor]]:
    """Collects what goes into the vision head, (B, H), one tensor a forward: the image features that probes use."""
    seen: list[torch.Tensor] = []
    hook = model.aligner.vision.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def embed_texts(model: DualEncoder, processor: DualEncoderProcessor, texts: Sequence[str]) -> NDArray[np.float32]:
    """(len(texts), D) unit-norm embeddings."""
    device = next(model.parameters()).device
    inputs = processor(text=list(texts), return_tensors="pt", padding=True)
    out = model(input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device))
    return out.text_embeds.cpu().numpy()
