"""Every objective once more, as its paper writes it: one number at a time, in float64. And batches to compare them on.

B pairs, D embedding size, R regions and the class token before them, T word pieces.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from losses_parity import draw, draw_ids
from torch import Tensor
from torch.nn.functional import normalize

from feddra_ds import objectives
from feddra_ds.config.load import from_dict
from feddra_ds.objectives.base import Objective
from feddra_ds.objectives.features import Features

DIM = 6
OBJECTIVES: dict[str, list[dict[str, Any]]] = {  # options that change what is computed
    "convirt": [{}, {"image_to_text": 0.3, "anchor_reduction": "sum"}],
    "siglip": [{}, {"bias": -3.0, "anchor_weight": 0.3}],
}
CASES = [(name, options) for name, several in OBJECTIVES.items() for options in several]


def build(name: str, **options: Any) -> Objective:
    return objectives.build(from_dict({"data": {"root": "x"}, "objective": {"name": name, **options}}).objective)


def batch(objective: Objective, num_pairs: int) -> tuple[Features, Features]:
    """A batch, whose floats are leaves with a gradient, and its anchors: unit norm, float64."""
    image, text, *theirs = (normalize(x, dim=1) for x in draw((num_pairs, DIM), torch.float64))
    temperature = torch.tensor([objective.options.temperature], dtype=torch.float64)
    draws = torch.Generator().manual_seed(7)
    learned = tuple(
        about.start + (about.std or 0.1) * torch.randn(about.shape, generator=draws, dtype=torch.float64)
        for _, about in sorted(type(objective).learned(objective.options, DIM).items())
    )
    ours = Features(image, text, text_ids=draw_ids(num_pairs), temperature=temperature, learned=learned)
    leaf = lambda x: x.clone().requires_grad_() if x.is_floating_point() else x
    return ours.with_tensors({place: leaf(x) for place, x in ours.tensors().items()}), Features(*theirs)


def gradients(total: Tensor, of: Features) -> dict[str, Tensor]:
    """By every float of the batch; 0 where the loss does not depend on it."""
    leaves = {f"{name} {place}": x for (name, place), x in of.tensors().items() if x.requires_grad}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def plain(objective: Objective, features: Features, anchors: Features | None) -> Tensor:
    """The loss of the batch as the paper of the objective has it, plus its part of equation (2)."""
    options: Any = objective.options
    alignment = PLAIN[options.name](options, features)
    total = options.alignment_weight * alignment
    if anchors is not None:
        total = total + options.anchor_weight / objective.loss_scale * _anchor_term(options, features, anchors)
    return total


def _anchor_term(options: Any, features: Features, anchors: Features) -> Tensor:
    terms = []
    for j in range(len(features.image)):
        for ours, theirs in ((features.image, anchors.image), (features.text, anchors.text)):
            squares = [(a - b) ** 2 for a, b in zip(ours[j], theirs[j], strict=True)]
            terms.append(sum(squares) / (len(squares) if options.anchor_reduction == "mean" else 1))
    return sum(terms) / len(features.image)  # type: ignore[return-value]


def _info_nce(scores: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """−log of each diagonal entry's share of its row, and of its column."""
    size = range(len(scores))
    rows = [-(scores[j][j].exp() / sum(scores[j][k].exp() for k in size)).log() for j in size]
    columns = [-(scores[j][j].exp() / sum(scores[k][j].exp() for k in size)).log() for j in size]
    return rows, columns


def _similarities(features: Features) -> list[list[Tensor]]:
    tau = features.temperature
    return [[(u @ v / tau).squeeze() for v in features.text] for u in features.image]


def convirt(options: Any, features: Features) -> Tensor:
    """Zhang et al. 2020, equations (2) to (4)."""
    to_text, to_image = _info_nce(_similarities(features))
    weight = options.image_to_text
    return sum(weight * a + (1 - weight) * b for a, b in zip(to_text, to_image, strict=True)) / len(to_text)  # type: ignore


def siglip(options: Any, features: Features) -> Tensor:
    """Zhai et al. 2023, algorithm 1."""
    (bias,) = features.learned
    total = torch.zeros((), dtype=torch.float64)
    for j, row in enumerate(_similarities(features)):
        for k, score in enumerate(row):
            z = 1 if j == k else -1
            total = total - torch.log(1 / (1 + torch.exp(z * (-score - bias.squeeze()))))
    return total / len(features.image)


PLAIN = {"convirt": convirt, "siglip": siglip}


def chance_of(objective: Objective, num_pairs: int) -> float:
    """The mean of per_pair where all embeddings are one."""
    alike = torch.full((num_pairs, DIM), 1 / math.sqrt(DIM), dtype=torch.float64)
    temperature = objective.options.temperature
    losses = objective.per_pair(Features(alike, alike, temperature=temperature), torch.arange(num_pairs))
    assert losses.shape == (num_pairs,)
    return float(losses.mean())
