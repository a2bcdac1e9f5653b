"""The pictures of a dataset that a text describes best: what `feddra-ds search` shows.

Legend: n pairs, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.evaluation import finite
from feddra_ds.evaluation.examples import PairReader
from feddra_ds.evaluation.gallery import Gallery, embed_texts
from feddra_ds.evaluation.opened import open_for

PICTURE = 352  # pixels of a picture's longer side; shown at up to half of that


@dataclass(frozen=True)
class Hit:
    """A picture that was found: the cosine of its embedding and the query's; its own text; itself as a data: URL, None where it
    cannot be read."""

    client: str
    split: str
    key: str
    score: float
    text: str
    image: str | None


@dataclass(frozen=True)
class Search:
    """What was searched, how many pictures there are, and those that were found, best first."""

    query: str
    model: str
    data: str
    split: str
    pictures: int
    hits: list[Hit]
    non_finite: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """A JSON-ready dict, without the pictures themselves; docs/json_output.md says what is in it."""
        told = asdict(self)
        for hit in told["hits"]:
            del hit["image"]
        return told


def search(
    query: str,
    path: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "val",
    clients: Sequence[str] | None = None,
    top: int = 12,
    device: str = "auto",
    max_pairs: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    ema: bool = False,
) -> Search:
    """The `top` pictures of the split whose embeddings are nearest to that of `query`.

    The other options are those of evaluate.evaluate. Pictures whose embedding is not finite are not found. Raises
    ValueError, whose message names the option and what to do, and DataError for data that cannot be read.
    """
    if not query.strip():
        raise ValueError("QUERY: is empty; it is the text to look for, such as 'left effusion'")
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
    )
    models, dataset = opened.models, opened.dataset
    if not models.shared and len(dataset.client_ids) > 1:
        raise ValueError(
            f"--clients: each client of {models.path} has a model of its own, whose scores say nothing about another's; "
            f"name one of {', '.join(dataset.client_ids)}"
        )
    galleries = opened.galleries()
    model, processor = models.of(next(iter(galleries)))
    (text,) = embed_texts(model, processor, [query])
    reader, hits = PairReader(dataset, PICTURE), []
    for gallery, index, score in best(galleries, text, top):
        told, image = reader.read(gallery, index, picture=True)
        hits.append(Hit(gallery.client, gallery.split, gallery.keys[index], score, told, image))
    pictures, spoilt = sum(map(len, galleries.values())), finite.of_evaluation(models, galleries)
    return Search(query, str(models.source), opened.root, split, pictures, hits, spoilt)


def best(galleries: Mapping[str, Gallery], text: NDArray[np.float32], top: int) -> list[tuple[Gallery, int, float]]:
    """(gallery, pair, cosine) of the `top` pictures nearest to a text's embedding (D,); those that are not finite left out.
    Of equal ones, the first."""
    places = [(gallery, index) for gallery in galleries.values() for index in range(len(gallery))]
    with np.errstate(invalid="ignore"):
        scores = np.concatenate([g.image.astype(np.float64) @ text.astype(np.float64) for g in galleries.values()])
    order = np.argsort(np.where(np.isfinite(scores), -scores, np.inf), kind="stable")[:top]
    return [(*places[i], float(scores[i])) for i in order.tolist() if np.isfinite(scores[i])]
