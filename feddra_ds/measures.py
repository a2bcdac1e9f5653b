"""What `evaluate` measures on embedded galleries: retrieval with intervals, its control, zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .inference import Gallery, Models, embed_texts
from .labels import find_tasks, measure, zero_shot_scores
from .ranking import Ranks, bootstrap, ranks, recall_table

POOLED = "pooled"


@dataclass(frozen=True)
class Estimate:
    """Recall@k of a gallery, the mean of both directions, with its 95 % interval and the chance level."""

    k: int
    recall: float
    low: float
    high: float
    chance: float

    @property
    def above_chance(self) -> bool:
        return self.low > self.chance


def evaluate(
    models: Models, galleries: dict[str, Gallery], held_out: Sequence[str], *, draws: int, seed: int, shuffled: bool
) -> dict[str, Any]:
    """Retrieval of every client and of the pooled gallery of those that are not held out, as a JSON-ready dict."""
    if shuffled:
        galleries = {name: shuffle(gallery, seed) for name, gallery in galleries.items()}
    found = {name: ranks(g.image, g.text, g.text_ids) for name, g in galleries.items()}
    estimates = {name: estimate(found[name], galleries[name].groups, draws, seed) for name in galleries}
    insiders = [galleries[name] for name in galleries if name not in held_out]
    pooled = None
    if models.shared and len(insiders) > 1:
        # Shuffled within each client only, the pooled gallery would still tell sites apart.
        joined = join(insiders)
        joined = shuffle(joined, seed) if shuffled else joined
        found[POOLED] = ranks(joined.image, joined.text, joined.text_ids)
        estimates[POOLED] = estimate(found[POOLED], joined.groups, draws, seed)
        pooled = recall_table(found[POOLED])
    clients = {}
    for name, gallery in galleries.items():
        clients[name] = {
            "held_out": name in held_out,
            "split": gallery.split,
            **recall_table(found[name]),
            "skipped": gallery.skipped,
            "intervals": _intervals(estimates[name]),
        }
    names = [name for name in clients if name not in held_out] or list(clients)
    control = None
    if shuffled:
        judged = [POOLED] if pooled is not None else names
        control = all(_at_chance(found[n], seed) for n in judged)
    return {
        "shuffled_texts": shuffled,
        "control_at_chance": control,
        "clients": clients,
        POOLED: pooled and {**pooled, "intervals": _intervals(estimates[POOLED])},
        **across([clients[name] for name in names]),
        "worst_client": _worst(clients, names),
    }


def estimate(found: Ranks, groups: Sequence[str], draws: int, seed: int) -> list[Estimate]:
    """An Estimate for each cut-off below the gallery's size."""
    out = []
    for k in found.cutoffs:
        hits = found.hits("mean", k)
        low, high = bootstrap(hits, groups, draws=draws, seed=seed)
        out.append(Estimate(k, float(hits.mean()), low, high, float(found.chance(k).mean())))
    return out


def shuffle(gallery: Gallery, seed: int) -> Gallery:
    """The gallery with its texts moved, each image to another pair's text (a cyclic shift of a random order)."""
    order = np.random.default_rng(seed).permutation(len(gallery))
    moved = np.empty(len(gallery), dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return replace(gallery, text=gallery.text[moved], text_ids=gallery.text_ids[moved])


def join(galleries: Sequence[Gallery]) -> Gallery:
    """One gallery of several clients' pairs."""
    return Gallery(
        client=POOLED,
        split=galleries[0].split,
        **{name: np.concatenate([getattr(g, name) for g in galleries]) for name in ("image", "text", "text_ids")},
        features=np.concatenate([g.features for g in galleries]),
        keys=[f"{g.client}/{key}" for g in galleries for key in g.keys],
        infos=[
            info | ({"patient": f"{g.client}/{info['patient']}"} if info.get("patient") else {})
            for g in galleries
            for info in g.infos
        ],
        skipped={},
    )


def across(clients: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """mean, worst (least) and spread (most − least) of every recall and chance, over the clients that have it."""
    keys = dict.fromkeys(k for c in clients for k in c if "@" in k)
    columns = {key: [float(c[key]) for c in clients if key in c] for key in keys}
    recalls = {key: values for key, values in columns.items() if not key.startswith("chance")}
    return {
        "mean": {key: float(np.mean(values)) for key, values in columns.items()},
        "worst": {key: min(values) for key, values in recalls.items()},
        "spread": {key: max(values) - min(values) for key, values in recalls.items()},
    }


def skill(client: dict[str, Any], k: int = 5) -> float | None:
    """(recall − chance) / (1 − chance) at k, the mean of both directions: 0 is chance, 1 perfect, whatever the gallery."""
    if f"chance@{k}" not in client or client[f"chance@{k}"] >= 1:
        return None
    recall = (client[f"i2t_recall@{k}"] + client[f"t2i_recall@{k}"]) / 2
    return float((recall - client[f"chance@{k}"]) / (1 - client[f"chance@{k}"]))


def zero_shot(models: Models, galleries: dict[str, Gallery]) -> tuple[dict[str, Any], dict[str, str]]:
    """{label: {pooled: measures, clients: {client: measures}}}, and the labels left out with the reason."""
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


def _intervals(estimates: Sequence[Estimate]) -> dict[str, dict[str, Any]]:
    return {f"recall@{e.k}": asdict(e) | {"above_chance": e.above_chance} for e in estimates}


def _at_chance(found: Ranks, seed: int) -> bool:
    """Whether chance lies in the 99.9 % interval at every cut-off; pairs are resampled one by one."""
    for k in found.cutoffs:
        low, high = bootstrap(found.hits("mean", k), range(len(found)), draws=2000, seed=seed, level=0.999)
        if not low <= found.chance(k).mean() <= high:
            return False
    return True


def _worst(clients: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    skills = {name: value for name in names if (value := skill(clients[name])) is not None}
    if not skills:
        return None
    worst = min(skills, key=lambda name: skills[name])
    values = list(skills.values())
    return {
        "id": worst,
        "skill@5": skills[worst],
        "mean_skill@5": float(np.mean(values)),
        "spread_skill@5": max(values) - min(values),
    }
