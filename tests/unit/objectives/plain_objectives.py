"""Every objective once more, as its paper writes it: one number at a time, in float64. And batches to compare them on.

B pairs, D embedding size, R regions and the class token before them, T word pieces.
"""

from __future__ import annotations

import itertools
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
    "gloria": [
        {},
        {"local_weight": 0.6, "anchor_tokens": True, "duplicates": "negative"},
        {"anchor_tokens": True, "anchor_reduction": "sum", "attention_temperature": 1.0, "word_temperature": 0.7},
    ],
    "mgca": [
        {"num_prototypes": 5},
        {"num_prototypes": 3, "token_weights": "equal", "token_weight": 0.6, "prototype_weight": 1.7},
        {"num_prototypes": 4, "anchor_tokens": True, "sinkhorn_epsilon": 0.3, "sinkhorn_steps": 2},
    ],
}
OBJECTIVES["gcl"] = [
    {},
    {"learnable_temperature": True, "moving_average": 0.4, "epsilon": 0.05, "rho": 1.3, "temperature": 0.2},
    {"moving_average": 1.0, "anchor_reduction": "sum"},
]
CASES = [(name, options) for name, several in OBJECTIVES.items() for options in several]


WORDS = [  # [CLS], pieces, [SEP], padding; words of one, two and three pieces; a text without words
    [-1, 0, 1, 1, 2, -1, -1],
    [-1, 0, 0, 0, 1, -1, -1],
    [-1, 0, -1, -1, -1, -1, -1],
    [-1, -1, -1, -1, -1, -1, -1],
    [-1, 0, 1, 2, 3, 4, -1],
]


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
    unit = lambda *shape: normalize(torch.randn(num_pairs, *shape, DIM, generator=draws, dtype=torch.float64), dim=-1)
    words = torch.tensor(list(itertools.islice(itertools.cycle(WORDS), num_pairs)))
    ours = Features(image, text, unit(5), unit(7), text_ids=draw_ids(num_pairs), words=words)
    ours = ours._replace(temperature=temperature, learned=learned)
    if objective.num_kept:
        kept = torch.randn(num_pairs, objective.num_kept, generator=draws, dtype=torch.float64)
        kept[::3] = torch.nan  # every third pair is met for the first time
        ours = ours._replace(kept=kept)
    leaf = lambda x: x.clone().requires_grad_() if x.is_floating_point() else x
    return ours.with_tensors({place: leaf(x) for place, x in ours.tensors().items()}), Features(
        *theirs, unit(5), unit(7)
    )


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
        if getattr(options, "anchor_tokens", False):
            theirs = anchors._replace(words=features.words)
            for of in (_regions, _words):
                squares = [(a - b).square() for a, b in zip(of(features, j), of(theirs, j), strict=True)]
                each = [x.mean() if options.anchor_reduction == "mean" else x.sum() for x in squares]
                terms.append(sum(each) / max(len(each), 1))
    return sum(terms) / len(features.image)  # type: ignore[return-value]


def _regions(features: Features, j: int) -> list[Tensor]:
    """Those of an image, the class token left out."""
    assert features.image_tokens is not None
    return list(features.image_tokens[j, 1:])


def _words(features: Features, j: int) -> list[Tensor]:
    """Those of a text: the direction of the mean of each one's pieces."""
    assert features.words is not None
    assert features.text_tokens is not None
    numbers = features.words[j].tolist()
    pieces = [
        [features.text_tokens[j, t] for t, n in enumerate(numbers) if n == word] for word in sorted({*numbers} - {-1})
    ]
    means = [sum(group) / len(group) for group in pieces]
    return [mean / mean.norm() for mean in means]  # type: ignore[union-attr]


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


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    exponentials = [x.exp() for x in scores]
    return [x / sum(exponentials) for x in exponentials]


def gloria(options: Any, features: Features) -> Tensor:
    """Huang et al. 2021, section 3.2."""
    size = range(len(features.image))
    scores: list[list[Tensor]] = []
    for i in size:
        regions, row = _regions(features, i), []
        for k in size:
            total = torch.zeros((), dtype=torch.float64)
            for word in _words(features, k):
                attention = _softmax([word @ region / options.attention_temperature for region in regions])
                context: Any = sum(a * region for a, region in zip(attention, regions, strict=True))
                total = total + (context @ word / context.norm() / word.norm() / options.word_temperature).exp()
            z = total.log() * options.word_temperature if _words(features, k) else torch.zeros((), dtype=torch.float64)
            row.append(z / options.local_temperature)
        scores.append(row)
    everything = [*_info_nce(_similarities(features))]
    local = _info_nce(scores)
    terms = [sum(pair) for pair in zip(*everything, strict=True)]
    return (sum(terms) + options.local_weight * sum(sum(pair) for pair in zip(*local, strict=True))) / len(terms)  # type: ignore


def _cross_attention(options: Any, queries: list[Tensor], keys: list[Tensor], whole: Tensor) -> Tensor:
    """Wang et al. 2022, equations (3) and (4): L_LIA of one pair, without its halves."""
    tau = options.token_temperature
    found = []
    for query in queries:
        attention = _softmax([query @ key / tau for key in keys])
        mixed: Any = sum(a * key for a, key in zip(attention, keys, strict=True))
        found.append(mixed / mixed.norm())
    weights = [torch.ones((), dtype=torch.float64) / len(queries)] * len(queries)
    if options.token_weights == "similarity":
        weights = [x.detach() for x in _softmax([query @ whole / tau for query in queries])]
    forth, back = _info_nce([[query @ o / tau for o in found] for query in queries])
    return sum(w * (a + b) for w, a, b in zip(weights, forth, back, strict=True))  # type: ignore[return-value]


def _sinkhorn(options: Any, scores: Tensor) -> Tensor:
    """Caron et al. 2020, appendix A: (pairs, prototypes), each row a distribution."""
    q = (scores.detach() / options.sinkhorn_epsilon).exp().T
    q = q / q.sum()
    for _ in range(options.sinkhorn_steps):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def mgca(options: Any, features: Features) -> Tensor:
    """Wang et al. 2022, equations (1) to (10), in the sum of the directions."""
    terms = [a + b for a, b in zip(*_info_nce(_similarities(features)), strict=True)]
    (prototypes,) = features.learned
    centers = [c / c.norm() for c in prototypes]
    scores = [
        torch.stack([torch.stack([x @ c for c in centers]) for x in side]) for side in (features.image, features.text)
    ]
    assigned = [_sinkhorn(options, side) for side in scores]
    for j in range(len(terms)):
        regions, words = _regions(features, j), _words(features, j)
        if words:
            visual = _cross_attention(options, regions, words, features.image[j])
            textual = _cross_attention(options, words, regions, features.text[j])
            terms[j] = terms[j] + options.token_weight * (visual + textual) / 2
        for mine, other in ((0, 1), (1, 0)):
            shares = _softmax(list(scores[mine][j] / options.prototype_temperature))
            crossed = sum(q * share.log() for q, share in zip(assigned[other][j], shares, strict=True))
            terms[j] = terms[j] - options.prototype_weight * crossed
    return sum(terms) / len(terms)  # type: ignore[return-value]


def gcl(options: Any, features: Features) -> Tensor:
    """Yuan et al. 2022, algorithm 1, and Wei et al. 2024, equation (7): the estimator of the gradient as a loss.

    A value and a gradient that belong to no one function: log(ε + u), and ∇g / (ε + u).
    """
    scores, gamma = _similarities(features), options.moving_average
    size = range(len(scores))
    total = torch.zeros((), dtype=torch.float64)
    assert features.kept is not None
    for j in size:
        both = (
            sum((scores[j][k] - scores[j][j]).exp() for k in size if k != j) / (len(scores) - 1),
            sum((scores[k][j] - scores[j][j]).exp() for k in size if k != j) / (len(scores) - 1),
        )
        for g, before in zip(both, features.kept[j], strict=True):
            assert isinstance(g, Tensor)
            u = g.detach() if before.isnan() else (1 - gamma) * before.detach().exp() + gamma * g.detach()
            total = total + torch.log(options.epsilon + u) + (g - g.detach()) / (options.epsilon + u)
            total = total + (options.rho if options.learnable_temperature else 0.0)
    return total.squeeze() / len(scores) * features.temperature.squeeze() / options.temperature  # type: ignore[union-attr]


PLAIN = {"convirt": convirt, "siglip": siglip, "gloria": gloria, "mgca": mgca, "gcl": gcl}


def chance_of(objective: Objective, num_pairs: int) -> float:
    """The mean of per_pair where all embeddings are one."""
    alike = torch.full((num_pairs, DIM), 1 / math.sqrt(DIM), dtype=torch.float64)
    temperature = objective.options.temperature
    losses = objective.per_pair(Features(alike, alike, temperature=temperature), torch.arange(num_pairs))
    assert losses.shape == (num_pairs,)
    return float(losses.mean())
