"""Strategies that keep something or add something, as whole runs: compressed, with adapters and anchors, on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import largest_difference, make_config, metrics_of, on_each, run_all, same_bits, tree, weights_of, zero

from feddra_ds.common.errors import ConfigError
from feddra_ds.distributed.launch import Launch
from feddra_ds.run.checks import check

# Server steps of the size of the clients' changes, so that rounding cannot turn their sign.
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedadam": {"strategy__server_lr": 0.05, "strategy__tau": 0.05},
    "scaffold": {},
    "moon": {"strategy__mu": 5.0},
    "drfa": {"dro__step_size": 0.05},
}
BASE = {"schedule__stage1_steps": 2, "schedule__stage2_steps": 2, "schedule__stage2_start": "global"}
ADAPTER = {"type": "lora", "r": 2, "alpha": 4.0, "target_modules": ["query", "value"]}
ONE_STAGE = {"schedule__stage1_steps": 0}
HOW: dict[str, dict[str, Any]] = {
    "plain": ONE_STAGE,
    "int8": ONE_STAGE | {"aggregate__precision": "int8", "aggregate__block_size": 64},
    "lora": {"model__adapter": ADAPTER, "model__num_top_blocks": 1, "objective__anchor_weight": 1.0},
}


@pytest.mark.slow
def test_compression_anchors_and_adapters_go_with_every_strategy(dataset: Path, tmp_path: Path) -> None:
    rows = [(name, how) for name in STRATEGIES for how in HOW]
    configs = [
        (
            tree(
                dataset, tmp_path / f"{name}-{how}", strategy__name=name, evaluation__every=0, **(BASE | own | HOW[how])
            ),
        )
        for (name, how), own in ((row, STRATEGIES[row[0]]) for row in rows)
    ]
    on_each(run_all, configs, world_size=2, timeout=600)
    for name in STRATEGIES:
        lines = {how: metrics_of(tmp_path / f"{name}-{how}") for how in HOW}
        for how, told in lines.items():
            assert len(told) == 2
            assert all(np.isfinite(line["client_losses"]).all() for line in told), (name, how)
            assert not any(line["excluded_clients"] for line in told), (name, how)
        # int8 rounds a change by 1/254 of the largest of its block, twice. Only the first average is compared: later ones
        # may differ by whole gradients, where a hidden unit is on in the one run and off in the other.
        exact, rounded = (weights_of(tmp_path / f"{name}-{how}", 0) for how in ("plain", "int8"))
        moved = largest_difference(exact, weights_of(tmp_path / f"{name}-plain", 1))
        assert 0 < largest_difference(exact, rounded) < 0.03 * moved, name
        sent = [lines[how][-1]["bytes_sent_per_rank"] for how in ("plain", "int8")]
        assert sent[1] < 0.3 * sent[0], (name, "what travels is compressed, a snapshot too")
        first, last = (weights_of(tmp_path / f"{name}-lora", number) for number in (0, 1))
        adapters = [key for key in last if "lora_B" in key]
        assert adapters
        for key in adapters:
            assert np.abs(last[key] - first[key]).max() > 0, (name, key)
        assert all(ratio > 0 for ratio in lines["lora"][-1]["anchor_gradient_ratio"].values()), name


@pytest.mark.slow
def test_moon_looks_at_its_last_model_under_averaged_products(dataset: Path, tmp_path: Path) -> None:
    product = {
        "model__adapter": ADAPTER | {"aggregation": "product"},
        "model__num_top_blocks": 1,
        "schedule__rounds": 2,
    }
    arms = {"moon": {"strategy__mu": 20.0}, "fedavg": {}}
    configs = [
        (tree(dataset, tmp_path / name, strategy__name=name, evaluation__every=0, **BASE, **own, **product),)
        for name, own in arms.items()
    ]
    on_each(run_all, configs, world_size=2, timeout=600)
    first, last = ([weights_of(tmp_path / name, number) for name in arms] for number in (0, 1))
    assert same_bits(*first)
    assert largest_difference(*last) > 1e-5, "the term acts"


@pytest.mark.slow
def test_moon_knows_no_ranks_and_no_micro_batches_and_at_weight_0_is_fedavg(dataset: Path, tmp_path: Path) -> None:
    own = {"strategy__mu": 5.0, "schedule__rounds": 3, "evaluation__every": 0, "objective__direction_reduction": "mean"}
    one = tree(dataset, tmp_path / "one", strategy__name="moon", **BASE, **own)
    two = tree(
        dataset, tmp_path / "two", strategy__name="moon", deepspeed=zero(3), topology__ranks_per_slot=2,
        data__micro_batch_size=2, data__replay_cache_bytes=0, **BASE, **own,
    )  # fmt: skip
    off = tree(dataset, tmp_path / "off", strategy__name="moon", **BASE, **(own | {"strategy__mu": 0.0}))
    del own["strategy__mu"]
    plain = tree(dataset, tmp_path / "plain", strategy__name="fedavg", **BASE, **own)
    on_each(run_all, [(one,), (off,), (plain,)], timeout=600)
    on_each(run_all, [(two,)], world_size=2, timeout=600)
    ends = {name: weights_of(tmp_path / name, 2) for name in ("one", "two", "off", "plain")}
    assert same_bits(ends["off"], ends["plain"])
    assert largest_difference(ends["one"], ends["plain"]) > 1e-4, "the term acts"
    assert largest_difference(ends["one"], ends["two"]) <= 1e-5
    first = {name: weights_of(tmp_path / name, 0) for name in ("one", "plain")}
    assert same_bits(first["one"], first["plain"]), "in the first round a client has no model of its own yet"


def test_an_average_over_rounds_needs_a_global_model(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, strategy__name="local", aggregate__ema=0.9)
    with pytest.raises(ConfigError, match=r"aggregate\.ema: strategy\.name=local has no global model"):
        check(config, Launch.from_environment())


@pytest.mark.slow
def test_drfa_with_one_local_step_looks_at_the_model_of_the_round(dataset: Path, tmp_path: Path) -> None:
    """Its snapshot is then the round's model to the bit, and p moves as afl's would by the losses of that."""
    own = {"schedule__stage1_steps": 0, "schedule__rounds": 3, "evaluation__every": 0}
    by_steps = {steps: tmp_path / f"{steps}" for steps in (1, 4)}
    configs = [
        (tree(dataset, out, strategy__name="drfa", schedule__stage2_steps=steps, clients__per_round=2, **own),)
        for steps, out in by_steps.items()
    ]
    on_each(run_all, configs, world_size=2, timeout=600)
    one, four = (metrics_of(by_steps[steps]) for steps in (1, 4))
    assert all(line["followed_losses"] == line["client_losses"] for line in one)
    assert any(line["followed_losses"] != line["client_losses"] for line in four)
    assert all(len(line["present_clients"]) == 2 for line in one + four)
