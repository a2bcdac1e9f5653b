"""Train and validation sides that share no patient, no report and no picture. Reads no files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from feddra_ds.data.loading.order import permutation


def components(links: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Groups of rows that must stay together: rows with a link in common, directly or through other rows.

    links: for each row its links (patient, report, picture). Returns lists of row numbers, each sorted.
    """
    parent = list(range(len(links)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    owner: dict[Hashable, int] = {}
    for row, names in enumerate(links):
        for name in names:
            first = owner.setdefault(name, row)
            a, b = find(first), find(row)
            if a != b:
                parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(links)):
        groups[find(row)].append(row)
    return list(groups.values())


def choose_validation(clients: Sequence[str], groups: list[list[int]], fraction: float, seed: int) -> np.ndarray:
    """Which rows are validation: (rows,) bool. Groups stay whole, also where one spans several clients.

    Every client's share comes as near to `fraction` as its groups allow, and a client with two groups or more gets
    at least one on each side where that is possible.
    """
    chosen = np.zeros(len(clients), dtype=bool)
    if fraction <= 0 or not groups:
        return chosen
    names = sorted(set(clients))
    number = {name: i for i, name in enumerate(names)}
    # rows of each group at each client: (groups, clients) as sparse pairs
    shares: list[list[tuple[int, int]]] = []
    for group in groups:
        counts: dict[int, int] = defaultdict(int)
        for row in group:
            counts[number[clients[row]]] += 1
        shares.append(sorted(counts.items()))
    total = np.zeros(len(names))
    num_groups = np.zeros(len(names), dtype=int)
    for share in shares:
        for client, count in share:
            total[client] += count
            num_groups[client] += 1

    def cost(client: int, taken: float) -> float:
        away = ((taken - fraction * total[client]) / total[client]) ** 2
        if taken == total[client]:
            away += 100.0  # nothing to train on
        if taken == 0 and num_groups[client] > 1:
            away += 10.0  # nothing to validate on
        return float(away)

    taken = np.zeros(len(names))
    inside = np.zeros(len(groups), dtype=bool)
    order = permutation(len(groups), "validation", seed).tolist()
    for _ in range(20):  # each pass lowers the cost; the first one, in random order, does nearly all
        moved = False
        for g in order:
            sign = -1 if inside[g] else 1
            change = sum(cost(c, taken[c] + sign * n) - cost(c, taken[c]) for c, n in shares[g])
            if change < -1e-12:
                for c, n in shares[g]:
                    taken[c] += sign * n
                inside[g] = not inside[g]
                moved = True
        if not moved:
            break
    for g in np.flatnonzero(inside):
        chosen[groups[g]] = True
    return chosen
