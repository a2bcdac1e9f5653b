"""Retrieval on embedded galleries: recall with intervals, its control, and how the clients differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from feddra_ds.evaluation.gallery import Gallery, value_of
from feddra_ds.evaluation.verdict import ABOVE, BELOW, NUM_SHUFFLES, POOLED, SURE, UNSURE, joint_verdict
from feddra_ds.metrics.geometry import geometry
from feddra_ds.metrics.intervals import bootstrap
from feddra_ds.metrics.ranking import rank_table, recall_table


@dataclass(frozen=True)
class Estimate:
    """Recall@k of a gallery, the mean of both directions, with an interval and the chance level."""

    k: int
    recall: float
    low: float
    high: float
    chance: float

    @property
    def verdict(self) -> str:
        """What the interval says of chance: ABOVE, BELOW or UNSURE."""
        return ABOVE if self.low > self.chance + 1e-9 else BELOW if self.high < self.chance - 1e-9 else UNSURE


def measure_retrieval(
    galleries: dict[str, Gallery],
    held_out: Sequence[str],
    *,
    one_model: bool,
    draws: int,
    seed: int,
    shuffled: bool,
) -> dict[str, Any]:
    """Retrieval of every client and of the pooled gallery of those that are not held out, as a JSON-ready dict.

    one_model: all galleries were embedded by one model; else there is no pooled gallery. draws: of the intervals.
    shuffled: the control, every gallery with its texts in NUM_SHUFFLES random orders.
    """
    searched = dict(galleries)
    insiders = [galleries[name] for name in galleries if name not in held_out]
    if one_model and len(insiders) > 1:
        searched[POOLED] = join(insiders)
    measure = control if shuffled else retrieve
    found = {name: measure(gallery, draws, seed) for name, gallery in searched.items()}
    clients = {
        name: {"held_out": name in held_out, "split": g.split, **found[name].report(), "skipped": g.skipped}
        for name, g in galleries.items()
    }
    names = [name for name in clients if name not in held_out] or list(clients)
    result = {
        "shuffled_texts": shuffled,
        "clients": clients,
        POOLED: found[POOLED].report() if POOLED in found else None,
        **across([clients[name] for name in names]),
        "worst_client": _worst(clients, names),
    }
    return result | {"control_at_chance": joint_verdict(result) == UNSURE if shuffled else None}


@dataclass(frozen=True)
class Retrieved:
    """A gallery's recall_table (and rank_table), with an Estimate for each cut-off, and its geometry."""

    table: dict[str, float]
    estimates: list[Estimate]
    geometry: dict[str, float] | None = None

    def report(self) -> dict[str, Any]:
        """The table and the estimates as a JSON-ready dict."""
        intervals = {f"recall@{e.k}": asdict(e) | {"verdict": e.verdict} for e in self.estimates}
        return self.table | {"intervals": intervals, "geometry": self.geometry}


def retrieve(gallery: Gallery, draws: int, seed: int) -> Retrieved:
    """Recall with 95 % intervals from `draws` resamplings of whole patients, or of texts."""
    found = gallery.ranks
    estimates = []
    for k in found.cutoffs:
        hits = found.hits("mean", k)
        low, high = bootstrap(hits, gallery.groups, draws=draws, seed=seed)
        estimates.append(Estimate(k, float(hits.mean()), low, high, float(found.chance(k).mean())))
    return Retrieved(recall_table(found) | rank_table(found), estimates, geometry(gallery.image, gallery.text))


def control(gallery: Gallery, draws: int, seed: int) -> Retrieved:
    """The mean recall over NUM_SHUFFLES random pairings of images and texts, and SURE standard errors of it each way.

    A random pairing is found as often as chance says, unless the measure leaks or the model puts frequent texts first
    whatever the picture; that is what the control looks for. `draws` is not used.
    """
    orders = [shuffle(gallery, [seed, i]).ranks for i in range(NUM_SHUFFLES)]
    tables = [recall_table(found) for found in orders]
    estimates = []
    for k in orders[0].cutoffs:
        drawn = np.array([found.hits("mean", k).mean() for found in orders])
        mean, error = float(drawn.mean()), float(drawn.std(ddof=1)) / NUM_SHUFFLES**0.5
        estimates.append(Estimate(k, mean, mean - SURE * error, mean + SURE * error, tables[0][f"chance@{k}"]))
    means = {key: float(np.mean([t[key] for t in tables])) for key in tables[0]}
    return Retrieved(means | {"pairs": len(gallery)}, estimates)


def shuffle(gallery: Gallery, seed: int | Sequence[int]) -> Gallery:
    """The gallery with its texts in a random order, so that each image stands beside any of them alike."""
    moved = np.random.default_rng(seed).permutation(len(gallery))
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
            info | {name: f"{g.client}/{value}" for name in ("patient", g.match_by) if (value := value_of(info, name))}
            for g in galleries
            for info in g.infos
        ],
        skipped={},
        temperature=galleries[0].temperature,
        match_by=galleries[0].match_by,
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
