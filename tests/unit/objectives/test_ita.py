"""Image-text alignment: what its keys mean, and how hard its anchors pull."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from losses_parity import draw, draw_ids
from torch import Tensor

from feddra_ds import objectives
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import from_dict
from feddra_ds.federation.step import anchor_gradient_ratio
from feddra_ds.losses.reference import both_directions, normalize
from feddra_ds.objectives.base import Objective, anchor_distance
from feddra_ds.objectives.features import Features

PAIRS, DIM = 9, 6


def objective(**options: Any) -> Objective:
    return objectives.build(from_dict({"data": {"root": "x"}, "objective": options}).objective)


def features() -> tuple[Features, Features]:
    """A batch with repeated reports and its anchors, unit norm, float64."""
    image, text, *anchors = (normalize(x) for x in draw((PAIRS, DIM), torch.float64))
    return Features(image, text, text_ids=draw_ids(PAIRS)), Features(*anchors)


def gradients(total: Tensor, of: Features) -> Tensor:
    return torch.cat(torch.autograd.grad(total, (of.image, of.text), retain_graph=True))


def as_leaves(of: Features) -> Features:
    return of._replace(image=of.image.clone().requires_grad_(), text=of.text.clone().requires_grad_())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("direction", ["sum", "mean"])
def test_the_anchor_term_as_a_sum_is_d_times_as_strong(direction: str, impl: str) -> None:
    ours, theirs = features()
    common = {"impl": impl, "direction_reduction": direction, "alignment_weight": 0.5}
    summed = objective(anchor_reduction="sum", anchor_weight=0.3, **common)(ours, theirs, None)
    mean = objective(anchor_weight=0.3 * DIM, **common)(ours, theirs, None)
    torch.testing.assert_close(summed.total, mean.total)
    torch.testing.assert_close(summed.per_sample, mean.per_sample)
    torch.testing.assert_close(summed.anchor, DIM * mean.anchor)
    torch.testing.assert_close(summed.anchor, anchor_distance(ours, theirs, "sum"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_ratio_of_the_gradients_is_that_of_the_terms(reduction: str) -> None:
    ours, theirs = features()
    loss = objective(anchor_weight=0.7, alignment_weight=2.0, anchor_reduction=reduction)
    leaves = as_leaves(ours)
    u, v = normalize(leaves.image), normalize(leaves.text)
    alignment = sum(both_directions(u @ v.T / leaves.temperature, None, "negative"))
    assert isinstance(alignment, Tensor)
    anchor = anchor_distance(leaves._replace(image=u, text=v), theirs, reduction)
    expected = gradients(0.7 * anchor.mean(), leaves).norm() / gradients(2.0 * alignment.mean(), leaves).norm()
    assert anchor_gradient_ratio(loss, ours, theirs, None) == pytest.approx(float(expected), rel=1e-9)
    assert float(expected) > 0


def test_the_ratio_of_the_sum_is_d_times_that_of_the_mean() -> None:
    mean, summed = (
        anchor_gradient_ratio(objective(anchor_reduction=reduction), *features(), None) for reduction in ("mean", "sum")
    )
    assert summed == pytest.approx(DIM * mean, rel=1e-9)


@pytest.mark.parametrize("duplicates", ["negative", "positive", "ignore"])
def test_training_and_l_i_count_the_same_report_alike(duplicates: str) -> None:
    ours, _ = features()
    loss = objective(duplicates=duplicates)
    trained = loss(ours, None, None).alignment
    assert ours.text_ids is not None
    torch.testing.assert_close(loss.per_pair(ours, ours.text_ids), trained)
    plain = objective()(ours, None, None).alignment
    assert torch.equal(trained, plain) == (duplicates == "negative")


@pytest.mark.parametrize("duplicates", ["negative", "positive", "ignore"])
def test_a_model_that_knows_nothing_is_at_chance(duplicates: str) -> None:
    loss = objective(duplicates=duplicates)
    alike = torch.ones(8, 4) / 2
    found = loss.per_pair(Features(alike, alike), torch.arange(8))
    torch.testing.assert_close(found, torch.full((8,), loss.chance(8)))
    # one report for half of the batch: a positive or an ignored one is no way to be wrong
    half = loss.per_pair(Features(alike, alike), torch.tensor([0, 0, 0, 0, 1, 2, 3, 4]))
    expected = {"negative": 2 * math.log(8), "positive": 2 * math.log(2), "ignore": 2 * math.log(5)}[duplicates]
    assert float(half[0]) == pytest.approx(expected, rel=1e-6)
    assert float(half[-1]) == pytest.approx(loss.chance(8), rel=1e-6)


def test_triton_with_what_it_does_not_know_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        objective(impl="triton", duplicates="positive")
    assert caught.value.problems == [
        "objective.impl: triton knows objective.duplicates = negative only, not positive; must be auto or chunked "
        "(got 'triton')"
    ]
    assert objective(impl="triton").options.impl == "triton"
