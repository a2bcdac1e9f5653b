"""How different the clients of a dealt-out dataset are: each label's shares, and one number for the label dealt by."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from feddra_ds.data.loading.order import permutation

_RANDOM_DEALS = 20


@dataclass(frozen=True)
class Prevalence:
    """A label's share of all pairs, and its lowest and highest share of one client's."""

    label: str
    pooled: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Shift:
    """What a deal made of the labels.

    distance: total variation of each client's label distribution to the pooled one (0: alike, 1: nothing in common), mean
    over the clients; largest: of them, at `client`; by_chance: the mean distance of random deals of the same sizes.
    """

    prevalences: list[Prevalence]
    distance: float
    largest: float
    client: str
    by_chance: float


def measure_shift(owners: Sequence[str], dealt_by: Sequence[str], told: Sequence[Iterable[str]], seed: int) -> Shift:
    """owners, dealt_by, told: of each pair its client, the label it was dealt by, and the labels whose shares to show."""
    own = _distances(owners, dealt_by)
    client = max(own, key=lambda name: own[name])
    random = []
    for number in range(_RANDOM_DEALS):
        order = permutation(len(owners), "shift", seed, number).tolist()
        random.append(np.mean(list(_distances([owners[i] for i in order], dealt_by).values())))
    mean = float(np.mean(list(own.values())))
    return Shift(_prevalences(owners, told), mean, own[client], client, float(np.mean(random)))


def _distances(owners: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Total variation of each client's distribution of labels to the pooled one."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for owner, label in zip(owners, labels, strict=True):
        counts[owner][label] += 1
    pooled = Counter(labels)
    share = lambda counter, label: counter[label] / counter.total()
    return {
        owner: 0.5 * sum(abs(share(own, label) - share(pooled, label)) for label in pooled)
        for owner, own in counts.items()
    }


def _prevalences(owners: Sequence[str], told: Sequence[Iterable[str]]) -> list[Prevalence]:
    """Every label's, the ones that differ most between clients first."""
    sizes = Counter(owners)
    by_label: dict[str, Counter[str]] = defaultdict(Counter)
    for owner, labels in zip(owners, told, strict=True):
        for label in labels:
            by_label[label][owner] += 1
    out = []
    for label, counts in by_label.items():
        shares = [counts[owner] / sizes[owner] for owner in sizes]
        out.append(Prevalence(label, counts.total() / len(owners), min(shares), max(shares)))
    return sorted(out, key=lambda one: (one.lowest - one.highest, one.label))
