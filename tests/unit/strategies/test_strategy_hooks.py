"""Strategies at the values at which they are fedavg, what a missing client does, and configs that they refuse by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from feddra_ds import strategies
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.tree import merge
from feddra_ds.config.load import from_dict
from feddra_ds.objectives import Features
from feddra_ds.strategies import Strategy
from feddra_ds.strategies.base import Averaged
from feddra_ds.strategies.robust_weights import full_simplex_radius

ABOUT = Averaged(num_steps=5, learning_rate=0.1)


def strategy(name: str, dro: dict[str, Any] | None = None, **own: object) -> Strategy:
    config = from_dict(
        {"data": {"root": "x"}, "dro": dro or {}, "strategy": {"name": name, **own}, "optimizer": {"name": "sgd"}}
    )
    return strategies.build(config.strategy, config.dro)


def slices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in (7, 3)]


@pytest.mark.parametrize("name", ["fedavgm", "diloco"])
def test_without_momentum_and_with_rate_1_the_server_takes_the_mean(name: str) -> None:
    own, old, state = strategy(name, server_momentum=0.0, server_lr=1.0), slices(0), {}
    for seed in (1, 2):
        mean = slices(seed)
        old = own.server_step(old, mean, state, ABOUT)
        for new, target in zip(old, mean, strict=True):  # w + (mean − w) is the mean to the rounding of one sum
            torch.testing.assert_close(new, target, rtol=0, atol=5e-7)


def test_fedprox_at_mu_0_asks_for_no_correction() -> None:
    assert not strategy("fedprox", mu=0.0).corrects
    assert strategy("fedprox", mu=0.1).corrects


def test_a_large_mu_pins_a_client_to_the_global_model() -> None:
    live, start = slices(0), slices(1)
    strategy("fedprox", mu=1e9).correct(live, start, {}, learning_rate=0.1)
    for x, origin in zip(live, start, strict=True):
        torch.testing.assert_close(x, origin, rtol=0, atol=1e-6)


def test_scaffold_s_first_round_is_fedavg_s_to_the_bit() -> None:
    own, live, start, mean, state = strategy("scaffold"), slices(0), slices(1), slices(2), {}
    before = [x.clone() for x in live]
    own.begin_stage(start, state, {})
    own.correct(live, start, state, learning_rate=0.1)
    assert all(torch.equal(x, y) for x, y in zip(live, before, strict=True))
    new = own.server_step(start, mean, {}, ABOUT)
    assert all(torch.equal(x, y) for x, y in zip(new, mean, strict=True))


def test_qffl_at_q_0_is_fedavg() -> None:
    own, center = strategy("qffl", q=0.0), np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(own.next_mixture(np.full(3, 1 / 3), np.array([1.0, 5, 2]), center), center, atol=1e-15)
    old, mean = slices(0), slices(1)
    new = own.server_step(old, mean, {}, Averaged(5, 0.1, drift=3.0))
    assert all(torch.equal(x, y) for x, y in zip(new, mean, strict=True))


def test_qffl_leaves_the_weight_of_a_client_without_a_loss() -> None:
    own, p = strategy("qffl", q=2.0, lipschitz=1.0), np.array([0.2, 0.5, 0.3])
    moved = own.next_mixture(p, np.array([1.0, np.nan, 2.0]), np.array([0.4, 0.2, 0.4]))
    np.testing.assert_allclose(moved, [0.1, 0.5, 0.4])  # c F² are as 1 to 4, of the half that is left


def test_scaffold_s_control_is_moved_by_those_who_took_part() -> None:
    """Against c ← c + Σ p_i Δc_i over clients 0 and 2 of three, with p as it is."""
    own, weights, outer = strategy("scaffold"), [0.2, 0.5, 0.3], {}
    start, clients = slices(0), [{}, {}, {}]
    for number, present in enumerate([(0, 1, 2), (0, 2)]):
        before = [x.clone() for x in outer.get("control", [torch.zeros(7), torch.zeros(3)])]
        changes, mean = [torch.zeros(7), torch.zeros(3)], [torch.zeros(7), torch.zeros(3)]
        share = sum(weights[i] for i in present)
        for i in present:
            live = slices(10 * number + i + 1)
            mine = [x.clone() for x in clients[i].get("control", [torch.zeros(7), torch.zeros(3)])]
            own.begin_stage(start, clients[i], {"control": before})
            own.end_stage(live, start, clients[i], learning_rate=0.1, num_steps=5)
            for part in (0, 1):
                changes[part] += weights[i] * (clients[i]["control"][part] - mine[part])
                mean[part] += weights[i] / share * live[part]
        own.server_step(start, mean, outer, Averaged(5, 0.1, share))
        for now, then, change in zip(outer["control"], before, changes, strict=True):
            torch.testing.assert_close(now, then + change)


def test_drfa_averages_clients_as_often_as_they_were_drawn() -> None:
    weights = strategy("drfa").average_weight(np.array([0.1, 0.6, 0.3]), np.array([1, 3, 0]))
    np.testing.assert_array_equal(weights, [0.25, 0.75, 0])


def test_drfa_moves_p_as_afl_does() -> None:
    p, losses, center = np.array([0.1, 0.6, 0.3]), np.array([2.0, 5, 1]), np.full(3, 1 / 3)
    moved = [strategy(name, {"step_size": 0.05}).next_mixture(p, losses, center) for name in ("drfa", "afl")]
    np.testing.assert_array_equal(*moved)


def features(seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.randn(6, 4, generator=generator) for _ in range(2)))


def test_moon_s_term_is_the_cross_entropy_of_the_paper_s_two_similarities() -> None:
    live, anchors, previous = features(0), features(1), features(2)
    found = strategy("moon", mu=5.0, temperature=0.3).added_loss(live, anchors, previous)
    wanted = torch.zeros(6)
    for z, near, far in zip(live[:2], anchors[:2], previous[:2], strict=True):
        cosines = torch.stack([torch.cosine_similarity(z, other, dim=1) for other in (near, far)], 1)
        wanted += torch.nn.functional.cross_entropy(cosines / 0.3, torch.zeros(6, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(found, 5 * wanted)


def test_moon_s_gradient_is_0_where_the_client_s_last_model_is_the_global_one() -> None:
    """The paper's first round, of which this is the reason to leave the term out."""
    image, text = (x.requires_grad_() for x in features(0)[:2])
    loss = strategy("moon").added_loss(Features(image, text), features(1), features(1))
    for gradient in torch.autograd.grad(loss.sum(), [image, text]):
        torch.testing.assert_close(gradient, torch.zeros(6, 4), rtol=0, atol=1e-7)


def test_moon_at_mu_0_adds_nothing() -> None:
    assert not strategy("moon", mu=0.0).adds_loss
    assert strategy("moon", mu=0.1).adds_loss


def test_afl_is_feddra_where_the_ball_holds_the_simplex() -> None:
    rng, center = np.random.default_rng(0), np.full(5, 0.2)
    afl = strategy("afl", {"step_size": 0.1})
    ball = strategy(
        "feddra",
        {
            "ascent": "projected",
            "step_size": 0.1,
            "radius": full_simplex_radius(center),
            "minimum_weight": 0.0,
            "maximum_weight": None,
        },
    )
    p = q = center
    for _ in range(20):
        losses = rng.uniform(0, 7, 5)
        p, q = afl.next_mixture(p, losses, center), ball.next_mixture(q, losses, center)
        np.testing.assert_allclose(p, q, atol=1e-9)
    assert p.min() == 0.0, "the edge of the simplex was never reached, so nothing was compared there"


TWO_STAGES: dict[str, Any] = {"schedule": {"stage1_steps": 2, "stage2_steps": 3}}
READ_OFF_ANCHORS: dict[str, Any] = TWO_STAGES | {
    "dro": {"evaluate_on": "anchors"},
    "objective": {"anchor_weight": 1.0},
}
PRODUCT, RESIDUAL, STACK, ALTERNATE = (
    {"model": {"adapter": {"type": "lora", "aggregation": rule}}}
    for rule in ("product", "residual", "stack", "alternate")
)


@pytest.mark.parametrize(
    ("name", "tree", "key", "remedy"),
    [
        *((name, TWO_STAGES, "schedule.stage2_start", "use global") for name in ("fedavgm", "diloco", "fedadam", "scaffold")),
        *((name, PRODUCT, "model.adapter.aggregation", "use factors") for name in ("fedavgm", "fedyogi", "scaffold")),
        *((name, tree, "model.adapter.aggregation", "moves the frozen weights")
          for name, tree in (("diloco", RESIDUAL), ("fedadam", STACK), ("scaffold", RESIDUAL))),
        ("scaffold", ALTERNATE, "model.adapter.aggregation", "lets one factor rest"),
        ("qffl", {"strategy": {"lipschitz": 1.0}} | RESIDUAL, "model.adapter.aggregation", "use factors"),
        ("qffl", {"strategy": {"lipschitz": 0.0}} | TWO_STAGES, "schedule.stage2_start", "use global"),
        ("qffl", {"strategy": {"q": 1.0}}, "strategy.lipschitz", "use sgd"),
        ("qffl", {"strategy": {"q": 0.0}, "dro": {"apply": "loss"}}, "dro.apply", "use aggregate"),
        ("qffl", {"strategy": {"q": 0.0}, "dro": {"fixed_weights": [0.5, 0.5]}}, "dro.fixed_weights", "remove it"),
        ("afl", {"clients": {"per_round": 2}}, "clients.per_round", "set dro.minimum_weight"),
        ("drfa", TWO_STAGES | {"aggregate": {"after_stage1": False}}, "aggregate.after_stage1", "use true"),
        ("drfa", PRODUCT, "model.adapter.aggregation", "use factors"),
        ("drfa", {"dro": {"apply": "both"}}, "dro.apply", "use aggregate"),
        ("drfa", {"clients": {"minimum": 2}}, "clients.minimum", "use 1"),
        ("drfa", READ_OFF_ANCHORS, "dro.evaluate_on", "use train"),
        ("drfa", {"aggregate": {"precision": "int2", "sparsity": 0.05}}, "aggregate.sparsity", "use null"),
        ("scaffold", {"dro": {"radius": 0.5}}, "dro.radius", "use 0"),
        ("scaffold", {"dro": {"radius_share": 0.5}}, "dro.radius", "use 0"),
        ("scaffold", {"dro": {"apply": "both"}}, "dro.apply", "use aggregate"),
    ],
)  # fmt: skip
def test_what_does_not_compose_is_refused_by_name(name: str, tree: dict[str, Any], key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(merge({"data": {"root": "x"}, "strategy": {"name": name}}, tree))
    (line,) = caught.value.problems
    assert line.startswith(f"{key}: ")
    assert remedy in line


def test_exact_adapters_go_with_what_keeps_nothing() -> None:
    for name, options in (("fedprox", {"mu": 0.1}), ("afl", {}), ("qffl", {"lipschitz": 0.0})):
        for rule in (RESIDUAL, STACK, ALTERNATE):
            from_dict({"data": {"root": "x"}, "strategy": {"name": name, **options}} | rule)
    for name in ("fedavgm", "fedadam", "diloco"):
        from_dict({"data": {"root": "x"}, "strategy": {"name": name}} | ALTERNATE)


@pytest.mark.parametrize(
    "name", ["fedprox", "moon", "fedavgm", "fedadam", "fedyogi", "diloco", "scaffold", "afl", "drfa"]
)
def test_what_composes_is_accepted(name: str) -> None:
    tree = {"data": {"root": "x"}, "strategy": {"name": name}, "objective": {"anchor_weight": 1.0}}
    from_dict(tree | {"aggregate": {"precision": "int8"}, "model": {"adapter": {"type": "lora"}}})
    two = TWO_STAGES["schedule"] | {"stage2_start": "global"}
    from_dict(tree | {"schedule": two})
