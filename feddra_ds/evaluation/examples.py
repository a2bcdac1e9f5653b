"""Example retrievals for the report: random pictures with the reports found for them, and reports with their pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.loading.images import BadSample, open_image, to_rgb
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.gallery import Gallery, embed_clients
from feddra_ds.evaluation.models import Models
from feddra_ds.evaluation.retrieval import join
from feddra_ds.metrics.ranking import Ranks

THUMBNAIL = 176  # pixels of the longer side; shown at half of that
NUM_TEXTS, NUM_IMAGES = 3, 4  # results shown of a query
_MAX_TEXT = 600


@dataclass(frozen=True)
class Found:
    """One of the results: its similarity, whether it is a match, and its text and picture (a data: URL)."""

    score: float
    match: bool
    client: str
    text: str
    image: str | None


@dataclass(frozen=True)
class Example:
    """A query with its best results. rank: from 1, where the match stands among the `gallery` different texts, or pictures."""

    client: str
    image: str | None
    text: str
    rank: int
    gallery: int
    found: list[Found]


@dataclass
class _Shelf:
    """What is searched: one gallery, where each of its pairs lies, and how its queries fared."""

    gallery: Gallery
    places: list[tuple[Gallery, int]]
    ranks: Ranks


@dataclass
class PairReader:
    """Texts and pictures of the pairs, from the shards. side: pixels of a picture's longer side."""

    dataset: Dataset
    side: int = THUMBNAIL
    _open: dict[str, tuple[Samples, dict[str, int]]] = field(default_factory=dict)

    def read(self, gallery: Gallery, index: int, *, picture: bool) -> tuple[str, str | None]:
        """(text, picture as a data: URL) of a gallery's pair; None where no picture is asked for or it cannot be read."""
        if gallery.client not in self._open:
            samples = self.dataset.samples(gallery.client, gallery.split)
            self._open[gallery.client] = samples, {key: i for i, key in enumerate(samples.keys)}
        samples, where = self._open[gallery.client]
        number = where[gallery.keys[index]]
        text = " ".join((samples.read_text(number) or b"").decode("utf-8", errors="replace").split())
        data = samples.read_image(number) if picture else None
        return text[:_MAX_TEXT] + ("…" if len(text) > _MAX_TEXT else ""), thumbnail(data, self.side) if data else None


def retrieval_examples(
    models: Models, dataset: Dataset, split: str, *, num_each: int, max_pairs: int, seed: int
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """(pictures with the texts found, texts with the pictures found), `num_each` of each, drawn at random by the seed; and
    what is not finite (finite.of_evaluation).

    They are spread over the clients. The gallery is everybody's where all share one model, else the client's own.
    """
    galleries = embed_clients(models, dataset, dataset.client_ids, split, max_pairs=max_pairs, batch_size=32, seed=seed)
    groups = [list(galleries)] if models.shared else [[client] for client in galleries]
    shelves: dict[str, tuple[_Shelf, int]] = {}  # client → its shelf, and where its pairs begin there
    for group in groups:
        parts = [galleries[client] for client in group]
        gallery = parts[0] if len(parts) == 1 else join(parts)
        shelf = _Shelf(
            gallery,
            [(part, i) for part in parts for i in range(len(part))],
            gallery.ranks,
        )
        start = 0
        for client, part in zip(group, parts, strict=True):
            shelves[client], start = (shelf, start), start + len(part)
    reader = PairReader(dataset)
    by_image, by_text = [], []
    for number, (client, index) in enumerate(_draw(galleries, 2 * num_each, np.random.default_rng(seed))):
        shelf, start = shelves[client]
        if number % 2 == 0:
            by_image.append(_example(shelf, start + index, reader, by_image=True))
        else:
            by_text.append(_example(shelf, start + index, reader, by_image=False))
    return by_image, by_text, finite.of_evaluation(models, galleries)


def _draw(galleries: dict[str, Gallery], wanted: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Queries in turn from each client, two at a time (one by picture, one by text), without repeats."""
    orders = {client: rng.permutation(len(g)).tolist() for client, g in galleries.items()}
    out: list[tuple[str, int]] = []
    while len(out) < wanted and any(orders.values()):
        for client, order in orders.items():
            out += [(client, order.pop()) for _ in range(min(2, len(order)))]
    return out[:wanted]


def _example(shelf: _Shelf, place: int, reader: PairReader, *, by_image: bool) -> Example:
    gallery = shelf.gallery
    queries, others = (gallery.image, gallery.text) if by_image else (gallery.text, gallery.image)
    scores = others.astype(np.float64) @ queries[place].astype(np.float64)
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-scores, kind="stable")
    if by_image:  # a report that several pairs share is shown once
        _, first = np.unique(gallery.text_ids[order], return_index=True)
        order = order[np.sort(first)]
    match_ids, found = gallery.match_ids, []
    for i in order[: NUM_TEXTS if by_image else NUM_IMAGES].tolist():
        owner, index = shelf.places[i]
        text, image = reader.read(owner, index, picture=not by_image)
        match = bool(gallery.text_ids[i] == gallery.text_ids[place] or match_ids[i] == match_ids[place] >= 0)
        found.append(Found(float(scores[i]), match, owner.client, text, image))
    owner, index = shelf.places[place]
    text, image = reader.read(owner, index, picture=True)
    side = shelf.ranks.i2t if by_image else shelf.ranks.t2i
    return Example(owner.client, image, text, int(side.better[place]) + 1, side.gallery, found)


def thumbnail(data: bytes, side: int = THUMBNAIL) -> str | None:
    """A small JPEG as a data: URL, `side` pixels at its longer side; None for a picture that cannot be read."""
    try:
        image = to_rgb(open_image(data))
    except BadSample:
        return None
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=78)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
