"""Whole runs with LoRA on the backbones: every averaging rule on any ranks, what travels, what is saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    largest_difference,
    make_config,
    metrics_of,
    on_each,
    on_ranks,
    predicted_bytes,
    run_all,
    tree,
    watched,
    weights_of,
    zero,
)
from lora_reference import average
from test_checkpoint import load_and_go_on

from feddra_ds.common.errors import ConfigError
from feddra_ds.distributed.launch import Launch
from feddra_ds.model import lora
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.run.checks import check

RULES = ("factors", "product", "freeze_a")


def _settings(rule: str, **more: Any) -> dict[str, Any]:
    adapter = {"type": "lora", "r": 3, "alpha": 6.0, "aggregation": rule, "target_modules": ["query", "value", "dense"]}
    return {"model__adapter": adapter, "model__num_top_blocks": 1, "schedule__rounds": 2, "optimizer__lr": 0.05} | more


def _shapes(dataset: Path, rule: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    config = make_config(dataset, Path("unused"), **_settings(rule))
    model = model_of(config, tokenizer_of(config))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, trained


def _updates(flat: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """All that trains, with B A in the place of factors, whose signs and rotations say nothing."""
    found = {name: values.reshape(shapes[name]) for name, values in flat.items()}
    for a, b in lora.pairs(list(found)):
        found[b] = found[b] @ found.pop(a)
    return found


@pytest.mark.parametrize(
    ("rule", "layout"),
    [
        pytest.param("factors", (2, 2, 3), marks=pytest.mark.slow),
        pytest.param("product", (4, 2, 2), marks=pytest.mark.slow),
        pytest.param("product", (2, 2, 0), marks=pytest.mark.slow),  # every rank has whole factors: they count once
        ("freeze_a", (2, 1, 0)),
    ],
    ids=["factors", "product", "product-whole", "freeze_a"],
)
def test_lora_knows_no_ranks(dataset: Path, tmp_path: Path, rule: str, layout: tuple[int, int, int]) -> None:
    shapes, trained = _shapes(dataset, rule)
    settings = _settings(rule, schedule__stage1_steps=1, schedule__stage2_steps=2, evaluation__every=0)
    for ranks, per_slot, stage in ((1, 1, 0), layout):  # ranks, ranks per slot, ZeRO stage
        config = tree(
            dataset, tmp_path / f"{ranks}", deepspeed=zero(stage), topology__ranks_per_slot=per_slot, **settings
        )
        on_each(run_all, [(config,)], world_size=ranks)
    one = weights_of(tmp_path / "1", 1)
    assert sorted(one) == sorted(trained), "what trains is saved, and nothing else"
    assert not [name for name in one if ".base_layer." in name]
    assert any("lora_A" in name for name in one) == (rule != "freeze_a")
    moved = [np.abs(values).max() for name, values in one.items() if "lora_B" in name]
    assert min(moved) > 1e-4, "every adapter trains"  # B starts at 0
    other = weights_of(tmp_path / f"{layout[0]}", 1)
    assert largest_difference(_updates(one, shapes), _updates(other, shapes)) <= 1e-5
    for a, b in zip(metrics_of(tmp_path / "1"), metrics_of(tmp_path / f"{layout[0]}"), strict=True):
        np.testing.assert_allclose(a["client_losses"], b["client_losses"], atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_average_is_that_of_the_clients_own_adapters(dataset: Path, tmp_path: Path, rule: str) -> None:
    shapes, _ = _shapes(dataset, rule)
    settings = _settings(rule, schedule__rounds=1, optimizer__name="adamw", optimizer__lr=0.01)
    (((seen,),)) = on_each(watched, [(tree(dataset, tmp_path, deepspeed=zero(0), **settings),)])
    ends = [stage for stage in seen["stages"] if stage["stage"] == "stage2"]
    states = [
        {name: torch.from_numpy(values).view(shapes[name]) for name, start, values in end["after"] if start == 0}
        for end in ends
    ]
    p = metrics_of(tmp_path)[0]["client_weights"]
    assert len(p) == len(states) > 1
    wanted = {name: tensor.numpy() for name, tensor in average(states, p, rule).items()}
    found = weights_of(tmp_path, 0)
    assert largest_difference(_updates(wanted, shapes), _updates(found, shapes)) <= 1e-6
    if rule != "product":
        return
    plain = {name: tensor.numpy() for name, tensor in average(states, p, "factors").items()}
    assert largest_difference(_updates(plain, shapes), _updates(found, shapes)) > 1e-5, "the rules can be told apart"


def test_what_travels_and_is_saved_is_what_trains(dataset: Path, tmp_path: Path) -> None:
    shapes, trained = _shapes(dataset, "factors")
    state = 4 * sum(int(np.prod(shapes[name])) for name in trained)
    settings = _settings("factors", schedule__rounds=1, aggregate__after_stage1=False)
    config = tree(dataset, tmp_path, deepspeed=zero(2), topology__ranks_per_slot=1, **settings)
    on_ranks(run_all, 2, config)
    sent = metrics_of(tmp_path)[0]["bytes_sent_per_rank"]
    assert sent == predicted_bytes(config, 2)
    assert state <= sent <= 1.2 * state, "one sync of what trains"
    files = (tmp_path / "checkpoints/round-000000/weights").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) <= 1.2 * state + 50_000, "names and offsets beside the values"


@pytest.mark.slow
def test_lora_saved_on_two_ranks_goes_on_at_one_and_four(dataset: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    first = _settings("product", schedule__rounds=1)
    on_ranks(run_all, 4, tree(dataset, saved, deepspeed=zero(2), topology__ranks_per_slot=2, **first))
    wanted = weights_of(saved, 0)
    for world_size, per_slot, stage in ((1, 1, 0), (4, 4, 3)):
        out = tmp_path / f"{world_size}"
        shutil.copytree(saved, out)
        config = tree(dataset, out, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, **_settings("product"))
        by_rank = on_ranks(load_and_go_on, world_size, config)
        assert by_rank[0]["next_round"] == 1
        for rank in by_rank:
            for name, start, values in rank["engine"]:
                assert np.array_equal(wanted[name][start : start + len(values)], values), name
    ends = [weights_of(tmp_path / name, 1) for name in ("1", "4")]
    shapes, _ = _shapes(dataset, "product")
    assert largest_difference(*(_updates(end, shapes) for end in ends)) <= 1e-5


def test_products_are_not_averaged_from_rounded_deltas(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, **_settings("product", aggregate__precision="int8"))
    with pytest.raises(ConfigError, match=r"aggregate.precision: int8 .* use fp32, or factors, freeze_a or alternate"):
        check(config, Launch.from_environment())
