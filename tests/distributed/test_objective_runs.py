"""Every objective with every strategy that it is meant for, on two slots; and what `gcl` keeps of each pair."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import largest_difference, metrics_of, on_each, run_all, tree, weights_of
from safetensors.numpy import load_file

from feddra_ds.objectives import OBJECTIVES

SMALL = {"schedule__rounds": 1, "schedule__stage1_steps": 1, "schedule__stage2_steps": 2}
MORE: dict[str, dict[str, Any]] = {
    "gloria": {"objective__anchor_tokens": True},
    "mgca": {"objective__num_prototypes": 6, "objective__anchor_tokens": True},
}


STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "feddra": {},
    "fedprox": {},
    "diloco": {"schedule__stage2_start": "global"},  # its momentum needs clients that start from the server's model
}
ALL = [(name, strategy) for name in OBJECTIVES for strategy in STRATEGIES]
SLICE = [
    ("ita", "feddra"), ("convirt", "diloco"), ("siglip", "fedprox"), ("gloria", "feddra"), ("mgca", "diloco"),
    ("gcl", "fedavg"),
]  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(SLICE, marks=pytest.mark.slow, id="slice"),
        pytest.param(ALL, marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_every_objective_trains_with_every_strategy(dataset: Path, tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    configs = [
        (
            tree(
                dataset, tmp_path / f"{name}-{strategy}", objective__name=name, strategy__name=strategy,
                **SMALL, **MORE.get(name, {}), **STRATEGIES[strategy],
            ),
        )
        for name, strategy in rows
    ]  # fmt: skip
    on_each(run_all, configs, world_size=2, timeout=600)  # 3 minutes for all 24 where two cores are free
    kept = tmp_path / "gcl-fedavg" / "checkpoints" / "round-000000" / "pairs"
    assert len(list(kept.iterdir())) == 3, "those of the clients of both slots"
    weights = {}
    for name, strategy in rows:
        (line,) = metrics_of(tmp_path / f"{name}-{strategy}")
        assert all(np.isfinite(loss) for loss in line["client_losses"]), (name, strategy)
        assert not line["excluded_clients"], (name, strategy)
        ratios = line["anchor_gradient_ratio"].values()
        assert all((ratio is None) == (strategy != "feddra") for ratio in ratios), (name, strategy)
        weights[name, strategy] = weights_of(tmp_path / f"{name}-{strategy}", 0)
    for (one, found), (other, theirs) in itertools.combinations(weights.items(), 2):
        if one[1] == other[1]:
            assert _shared_difference(found, theirs) > 1e-5, (one, other, "an objective acts under every strategy")
        elif one[0] == other[0]:
            assert _shared_difference(found, theirs) > 0, (one, other, "a strategy acts under every objective")


def _shared_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest, over what every objective has; what one learns itself is left out."""
    shared = [key for key in one if "learned" not in key and "log_ratio" not in key]
    return largest_difference({key: one[key] for key in shared}, {key: other[key] for key in shared})


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_is_kept_of_the_pairs_outlives_a_restart(dataset: Path, tmp_path: Path, ranks: int) -> None:
    def run(folder: str, rounds: int, ranks: int) -> Path:
        config = tree(
            dataset, tmp_path / folder, objective__name="gcl", topology__ranks_per_slot=ranks,
            **{**SMALL, "schedule__rounds": rounds},
        )  # fmt: skip
        on_each(run_all, [(config,)], world_size=ranks)
        return tmp_path / folder / "checkpoints" / f"round-{rounds - 1:06d}" / "pairs"

    straight = run("straight", 2, 1)
    first = run("resumed", 1, 1)
    resumed = run("resumed", 2, ranks)
    for path in sorted(straight.glob("*.safetensors")):
        before, one, two = (load_file(folder / path.name) for folder in (first, straight, resumed))
        assert set(before["ids"]) <= set(one["ids"])
        assert not np.array_equal(before["values"], one["values"])
        assert np.array_equal(one["ids"], two["ids"])
        assert np.isfinite(one["values"]).all()
        np.testing.assert_allclose(two["values"], one["values"], atol=1e-4)
