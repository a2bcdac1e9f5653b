"""Every objective beside its paper written out in plain lines: values and every gradient; L_i and chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_objectives import CASES, OBJECTIVES, batch, build, chance_of, gradients, plain
from torch.utils._python_dispatch import TorchDispatchMode

from feddra_ds.losses.reference import normalize
from feddra_ds.objectives import OBJECTIVES as TABLE
from feddra_ds.objectives.features import Features

PAIRS = 7
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
each_name = pytest.mark.parametrize("name", OBJECTIVES)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return result


def test_every_objective_of_the_table_is_here() -> None:
    assert {"ita", *OBJECTIVES} == set(TABLE)


@pytest.mark.parametrize("anchored", [True, False], ids=["anchors", "alone"])
@each_case
def test_values_and_gradients_are_the_papers(name: str, options: dict[str, Any], anchored: bool) -> None:
    objective = build(name, alignment_weight=0.8, **options)
    ours, theirs = batch(objective, PAIRS)
    loss = objective(ours, theirs if anchored else None, None)
    expected = plain(objective, ours, theirs if anchored else None)
    torch.testing.assert_close(loss.total, expected)
    found, wanted = gradients(loss.total, ours), gradients(expected, ours)
    for place, gradient in wanted.items():
        # by an embedding of unit norm only what is along the sphere matters
        torch.testing.assert_close(tangent(found[place], ours, place), tangent(gradient, ours, place), msg=place)
    assert any(float(x.norm()) > 1e-3 for x in wanted.values())
    torch.testing.assert_close(combined(name, loss.per_sample, objective.options), loss.total.detach())


def combined(name: str, per_sample: torch.Tensor, options: Any) -> torch.Tensor:
    """The total from the pairs' losses, of which the fused loss leaves λ₁ out."""
    return per_sample.mean() * (1.0 if name == "gcl" else options.alignment_weight)


@pytest.mark.parametrize("name", ["gloria", "mgca"])
def test_chunks_change_nothing_and_bound_the_memory(name: str) -> None:
    options = dict(OBJECTIVES[name][0])
    losses, found, largest = [], [], []
    for chunk_bytes in (1, 2000, 2**28):  # one pair at a time, a few, all
        objective = build(name, chunk_bytes=chunk_bytes, **options)
        ours, theirs = batch(objective, PAIRS)
        with LargestTensor() as seen:
            loss = objective(ours, theirs, None)
            found.append(gradients(loss.total, ours))
        losses.append(loss.per_sample)
        largest.append(seen.elements)
    assert largest[0] <= largest[1] <= largest[2]
    if name == "gloria":  # all scores at once: 7 x 7 pairs, 5 words, 4 regions; mgca's are within a pair
        assert largest[0] < PAIRS * PAIRS * 5 * 4 <= largest[2]
    for loss, gradient in zip(losses[:-1], found[:-1], strict=True):
        torch.testing.assert_close(loss, losses[-1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, found[-1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["gloria", "mgca"])
def test_padding_and_special_tokens_are_never_read(name: str) -> None:
    objective = build(name, anchor_tokens=True, **OBJECTIVES[name][0])
    ours, theirs = batch(objective, PAIRS)
    assert ours.text_tokens is not None
    assert ours.image_tokens is not None
    assert ours.words is not None
    nowhere, regions, words = ours.words < 0, ours.image_tokens.detach().clone(), ours.text_tokens.detach().clone()
    regions[:, 0], words[nowhere] = 100.0, 100.0
    changed = objective(ours._replace(image_tokens=regions, text_tokens=words), theirs, None)
    torch.testing.assert_close(changed.total, objective(ours, theirs, None).total)
    longer = ours._replace(
        text_tokens=torch.nn.functional.pad(words, (0, 0, 0, 3), value=9.0),
        words=torch.nn.functional.pad(ours.words, (0, 3), value=-1),
    )
    anchors = theirs._replace(text_tokens=torch.nn.functional.pad(theirs.text_tokens, (0, 0, 0, 3)))
    torch.testing.assert_close(objective(longer, anchors, None).total, changed.total)


def tangent(gradient: torch.Tensor, of: Features, place: str) -> torch.Tensor:
    name, _ = place.split()
    if name not in ("image", "text"):
        return gradient
    x = getattr(of, name).detach()
    return gradient - x * (x * gradient).sum(-1, keepdim=True)


@each_name
def test_a_model_that_knows_nothing_is_at_chance(name: str) -> None:
    objective = build(name)
    for num_pairs in (2, 8):
        assert chance_of(objective, num_pairs) == pytest.approx(objective.chance(num_pairs), rel=1e-6)
    assert objective.chance(8) * objective.loss_scale > objective.chance(2) * objective.loss_scale > 0


@each_name
def test_l_i_falls_where_pairs_match(name: str) -> None:
    objective = build(name)
    ours, _ = batch(objective, PAIRS)
    image, ids = ours.image.detach(), torch.arange(PAIRS)
    matched = objective.per_pair(Features(image, image, temperature=0.1), ids).mean()
    swapped = objective.per_pair(Features(image, image.roll(1, 0), temperature=0.1), ids).mean()
    assert float(matched) < objective.chance(PAIRS) < float(swapped)


def test_the_bias_of_siglips_l_i_is_the_best_one() -> None:
    objective = build("siglip")
    ours, _ = batch(objective, PAIRS)
    image, text = normalize(ours.image.detach()), normalize(ours.text.detach())
    found = float(objective.per_pair(Features(image, text, temperature=0.1), torch.arange(PAIRS)).mean())
    losses = []
    for bias in torch.linspace(-12, 12, 481, dtype=torch.float64):
        features = Features(image, text, temperature=0.1, learned=(bias.reshape(1),))
        losses.append(float(objective(features, None, None).total))
    assert found <= min(losses)
    assert found == pytest.approx(min(losses), abs=1e-3)  # a grid of 0.05
