"""Which keys may differ between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from typing import Any

import pytest

from feddra_ds.checkpoint.choose import differences
from feddra_ds.common.tree import merge
from feddra_ds.config.load import from_dict


def told(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, after = (from_dict(merge({"data": {"root": "x"}}, tree)) for tree in (saved, now))
    return differences(before.model_dump(mode="json"), after.model_dump(mode="json"), type(after))


def rounds(number: int, decay: str) -> dict[str, Any]:
    return {"schedule": {"rounds": number, "decay": decay}}


def test_more_rounds_go_on_at_a_constant_learning_rate() -> None:
    assert told(rounds(4, "constant"), rounds(6, "constant")) == []


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rounds_of_a_decay_are_kept(decay: str) -> None:
    assert told(rounds(4, decay), rounds(4, decay)) == []
    assert told(rounds(4, decay), rounds(6, decay)) == [
        "schedule.rounds: is 6, but the checkpoint was trained with 4, over which schedule.decay="
        f"{decay} takes the learning rate"
    ]


@pytest.mark.parametrize(
    ("saved", "now", "key"),
    [
        ({}, {"gradient_clipping": 1.0}, "gradient_clipping: is 1.0, but the checkpoint was trained with None"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled: is None, but the checkpoint was trained with True"),
        ({"bf16": {"enabled": True}}, {"bf16": {"enabled": False}}, "bf16.enabled: is False, but"),
        ({"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}, "bf16.enabled: is None, but"),
        ({}, {"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: is 'bf16', but"),
        ({}, {"prescale_gradients": True}, "prescale_gradients: is True, but"),
        (
            {"zero_optimization": {"stage": 3}},
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights: is True, but",
        ),
    ],
)
def test_what_deepspeed_computes_is_kept(saved: dict[str, Any], now: dict[str, Any], key: str) -> None:
    lines = told({"deepspeed": saved}, {"deepspeed": now})
    assert lines[0].startswith(f"deepspeed.{key}")
    assert len(lines) == (2 if "fp16" in now else 1)


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({}, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
        ({"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}),
        ({}, {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True}}),
        ({"gradient_clipping": 0.0}, {}),
        ({}, {"bf16": {"enabled": False}}),
    ],
)
def test_how_deepspeed_lays_it_out_may_change(saved: dict[str, Any], now: dict[str, Any]) -> None:
    assert told({"deepspeed": saved}, {"deepspeed": now}) == []
