"""What bad clients may send in place of their updates, put into a run where updates are held (aggregate.min_cosine, say).

They know all that the server knows, so each is the strongest of its kind. Legend: b bad clients, m good ones, D elements of
a rank's share of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from feddra_ds.distributed.topology import Topology
from feddra_ds.federation.aggregation.compression import Joined
from feddra_ds.federation.aggregation.held import HeldUpdates, elements
from feddra_ds.federation.aggregation.peers import gather_over_peers

LABEL_FLIP = "label flip"  # of the data: reports of other images
ATTACKS = ("sign flip", "1,000 ×", "noise", "zeros", "nothing", "stale", "ALIE", "IPM")
"""ALIE: "A little is enough", Baruch et al. 2019, arXiv 1902.06156: within the spread of the good ones, their standard
deviation off their mean. IPM: inner product manipulation, Xie et al. 2019, arXiv 1903.03936: against their mean, half as long.
zeros: weights of 0; nothing: the global model as it was; stale: the weights that the client had when it was first asked."""


def bad_rows(attack: str, own: Tensor, good: Tensor, base: Tensor, first: Tensor, seed: int) -> Tensor:
    """(b, D) weights in place of the bad clients' own, (b, D). good: (m, D); base: (D,) global; first: (b, D) of an old round."""
    mean, updates = good.mean(dim=0), own - base
    if attack == "sign flip":
        return base - updates
    if attack == "1,000 ×":
        return base + 1000 * updates
    if attack == "noise":
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed))
        return base + noise * 3 * updates.square().mean(dim=1, keepdim=True).sqrt()
    if attack == "zeros":
        return torch.zeros_like(own)
    if attack == "nothing":
        return base.expand_as(own)
    if attack == "stale":
        return first
    if attack == "ALIE":
        return (mean - good.std(dim=0)).expand_as(own)
    assert attack == "IPM", attack
    return (base - 0.5 * (mean - base)).expand_as(own)


def rows_of(held: HeldUpdates, topology: Topology) -> tuple[list[int], Tensor]:
    """Of all slots' clients: their indices and their elements, (N, D) fp32, of this rank's share. Collective over the peers."""
    rests = held.rests
    length = sum(x.numel() for x in elements(held.engine, held.parts, held.base, rests))
    mine = [torch.cat(list(elements(held.engine, held.parts, one.state, rests))) for one in held.updates]
    rows = torch.cat(gather_over_peers(torch.stack(mine) if mine else torch.zeros(0, length), topology))
    indices = torch.tensor([[float(one.index)] for one in held.updates]).view(-1, 1)
    return [int(i) for i in torch.cat(gather_over_peers(indices, topology)).flatten()], rows


def poison(
    held: HeldUpdates, topology: Topology, attack: str, bad: Sequence[int], old: dict[int, Tensor], seed: int
) -> None:
    """Overwrite the held updates of the bad clients. old: their rows when first asked, kept here. Collective over the peers."""
    rests = held.rests
    base = torch.cat(list(elements(held.engine, held.parts, held.base, rests)))
    indices, rows = rows_of(held, topology)
    at = [i for i, index in enumerate(indices) if index in bad]
    for i in at:
        old.setdefault(indices[i], rows[i].clone())
    if not at or attack == LABEL_FLIP:
        return
    good = torch.stack([row for i, row in enumerate(rows) if i not in at])
    first = torch.stack([old[indices[i]] for i in at])
    new = dict(zip([indices[i] for i in at], bad_rows(attack, rows[at], good, base, first, seed), strict=True))
    for one in held.updates:
        if one.index in new:
            Joined(list(elements(held.engine, held.parts, one.state, rests))).assign(0, new[one.index])


@contextmanager
def attacked(run: Any, attack: str | None, bad: Sequence[int]) -> Iterator[None]:
    """A run in which these clients attack in every average; None: nobody does."""
    compare, seen = HeldUpdates.compare, {"averages": 0}
    old: dict[tuple[str, ...], dict[int, Tensor]] = {}

    def poisoned(held: HeldUpdates, topology: Topology, included: Sequence[int]) -> None:
        if attack is not None:
            poison(held, topology, attack, bad, old.setdefault(held.parts, {}), seen["averages"])
        seen["averages"] += 1
        compare(held, topology, included)

    with patch.object(HeldUpdates, "compare", poisoned):
        if attack == LABEL_FLIP:
            for client in run.clients:
                if client.index in bad:
                    client.data.batches = _mixed_up(client.data.batches)
        yield


def _mixed_up(batches: Any) -> Any:
    """A client's batches in which each image has the next one's report."""

    def read(*args: Any) -> Iterator[Any]:
        for batch in batches(*args):
            moved = {name: getattr(batch, name).roll(1, 0) for name in ("input_ids", "attention_mask", "text_ids")}
            yield replace(batch, **moved)

    return read
