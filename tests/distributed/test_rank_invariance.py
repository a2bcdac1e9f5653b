"""A run's mathematics knows no ranks, no slots and no ZeRO stage: whole runs, compared by their last checkpoint.

SGD with a learnable temperature in fp32, because AdamW hides a gradient of the wrong scale; AdamW by losses and p.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import largest_difference, make_config, metrics_of, on_each, run_all, tree, weights_of, zero

SGD = {"schedule__rounds": 2, "objective__learnable_temperature": True}
ADAMW = {"schedule__rounds": 3, "optimizer__name": "adamw", "optimizer__lr": 3e-4, "optimizer__weight_decay": 0.05}

# (ranks, ranks per slot, ZeRO stage, what else differs)
Layout = tuple[int, int, int, dict[str, Any]]
FULL: list[Layout] = [
    (ranks, per_slot, stage, {})
    for (ranks, per_slot), stage in itertools.product([(1, 1), (2, 2), (2, 1), (4, 2)], range(4))
]
# With SHORT, every layout of ranks under three ZeRO stages and more.
MORE: list[Layout] = [
    (1, 1, 1, {}),
    (2, 2, 1, {}),
    (2, 2, 2, {}),
    (2, 1, 0, {}),
    (4, 2, 0, {}),
    (4, 2, 1, {}),
    (2, 1, 3, {"deepspeed__zero_optimization__sub_group_size": 3000}),
    (4, 2, 3, {"objective__anchors": "resident", "objective__impl": "reference"}),
]
SHORT: list[Layout] = [
    (1, 1, 0, {"data__micro_batch_size": 3, "data__num_workers": 1}),
    (1, 1, 3, {"deepspeed__zero_optimization__sub_group_size": 3000}),
    (2, 2, 3, {"model__activation_checkpointing": True}),
    (2, 1, 1, {}),
    (4, 2, 2, {}),
]


def _runs(dataset: Path, out: Path, layouts: Sequence[Layout], settings: dict[str, Any]) -> list[Path]:
    """Run every layout; their run folders."""
    folders = [out / f"{n}-{ranks}x{per_slot}-zero{stage}" for n, (ranks, per_slot, stage, _) in enumerate(layouts)]
    for world_size in (1, 2, 4):
        jobs = [
            (tree(dataset, folder, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, **settings, **more),)
            for folder, (ranks, per_slot, stage, more) in zip(folders, layouts, strict=True)
            if ranks == world_size
        ]
        on_each(run_all, jobs, world_size=world_size, timeout=500)
    return folders


def _compare_weights(dataset: Path, out: Path, layouts: Sequence[Layout]) -> None:
    one, *others = _runs(dataset, out, [(1, 1, 0, {}), *layouts], SGD)
    first, last, lines = _initial_weights(dataset, SGD), weights_of(one, 1), metrics_of(one)
    moved = largest_difference(first, last)
    assert moved > 1e-2, f"the runs hardly train ({moved:.1e}), so that agreeing says little"
    temperature = "aligner.temperature.log_ratio"
    assert abs(last[temperature][0] - first[temperature][0]) > 1e-3
    assert np.ptp(lines[0]["next_client_weights"]) > 1e-3
    for folder in others:
        gap = largest_difference(last, weights_of(folder, 1))
        assert gap <= 1e-5, f"{folder.name}: the weights differ by {gap:.1e} from one rank's"
        _compare_metrics(lines, metrics_of(folder), 1e-5, folder.name)


def _initial_weights(dataset: Path, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    from feddra_ds.model.build import model_of, tokenizer_of
    from feddra_ds.run.build import seed_everything

    config = make_config(dataset, Path("unused"), **settings)
    seed_everything(config.run.seed)
    model = model_of(config, tokenizer_of(config))
    return {name: parameter.detach().flatten().numpy() for name, parameter in model.named_parameters()}


def _compare_metrics(expected: list[dict[str, Any]], found: list[dict[str, Any]], bound: float, name: str) -> None:
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        for key in ("client_losses", "client_weights", "next_client_weights"):
            gap = np.abs(np.subtract(a[key], b[key])).max()
            assert gap <= bound, f"{name}, round {a['round']}: {key} differ by {gap:.1e}"
        for key in ("client_ids", "samples", "excluded_clients", "skipped_samples"):
            assert a[key] == b[key], f"{name}, round {a['round']}: {key}"
        assert a["val"].keys() == b["val"].keys()
        assert [v["pairs"] for v in a["val"].values()] == [v["pairs"] for v in b["val"].values()]


@pytest.mark.slow
def test_sgd_gives_the_same_weights_on_any_ranks(dataset: Path, tmp_path: Path) -> None:
    _compare_weights(dataset, tmp_path, SHORT)


@pytest.mark.exhaustive
def test_sgd_gives_the_same_weights_on_more_layouts(dataset: Path, tmp_path: Path) -> None:
    _compare_weights(dataset, tmp_path, MORE)


@pytest.mark.exhaustive
def test_sgd_gives_the_same_weights_on_all_layouts_and_stages(dataset: Path, tmp_path: Path) -> None:
    _compare_weights(dataset, tmp_path, FULL[1:])


@pytest.mark.parametrize("mean", [pytest.param(False, marks=pytest.mark.slow), True], ids=["sum", "mean"])
def test_adamw_gives_the_same_losses_and_weights_p(dataset: Path, tmp_path: Path, mean: bool) -> None:
    more = {"objective__direction_reduction": "mean"} if mean else {}
    one, other = _runs(dataset, tmp_path, [(1, 1, 0, {}), (2, 1, 1, {}) if mean else (4, 2, 2, {})], ADAMW | more)
    lines = metrics_of(one)
    assert lines[-1]["mean_loss"] < lines[0]["mean_loss"]
    _compare_metrics(lines, metrics_of(other), 1e-3, other.name)


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param([(1, 1, 0, {}), (2, 1, 1, {}), (2, 2, 2, {}), (2, 2, 3, {})], id="stages", marks=pytest.mark.slow),
        pytest.param(FULL, id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_adamw_gives_the_same_losses(dataset: Path, tmp_path: Path, layouts: list[Layout]) -> None:
    one, *others = _runs(dataset, tmp_path, layouts, ADAMW)
    for folder in others:
        _compare_metrics(metrics_of(one), metrics_of(folder), 1e-3, folder.name)


@pytest.mark.slow
def test_losses_read_off_the_anchors_know_no_ranks(dataset: Path, tmp_path: Path) -> None:
    settings = {**SGD, "dro__evaluate_on": "anchors", "dro__step_size": 5.0, "objective__duplicates": "positive"}
    one, two = _runs(dataset, tmp_path, [(1, 1, 0, {}), (4, 2, 1, {})], settings)
    assert largest_difference(weights_of(one, 1), weights_of(two, 1)) <= 1e-5
    a, b = metrics_of(one), metrics_of(two)
    assert a[0]["next_client_weights"] is None  # p moves at the next round's first aggregation
    assert np.ptp(a[1]["client_weights"]) > 1e-2
    np.testing.assert_allclose(a[1]["client_weights"], b[1]["client_weights"], atol=1e-5)
    np.testing.assert_allclose(a[0]["client_losses"], b[0]["client_losses"], atol=1e-5)
