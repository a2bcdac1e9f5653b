"""What each stage may move, where anchors come from, and where the weights p act.

Whole runs through `build`; `watched` records every client's weights around each of its stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    assemble,
    build_run,
    finish,
    largest_difference,
    metrics_of,
    on_each,
    on_ranks,
    pieces_of,
    run_all,
    same_bits,
    tree,
    watched,
    weights_of,
    zero,
)

IDS = ["north", "south", "west"]
FASTER = {"optimizer__lr": 0.03}
ADAMW = {"optimizer__name": "adamw", "optimizer__lr": 3e-4, "optimizer__weight_decay": 0.05}


# ---- inside a rank
def train_clients(config_tree: dict[str, Any], order: list[int]) -> list[Any]:
    """Both stages of one client after the other on one new engine; the engine's masters after each of them."""
    from feddra_ds.data.loading.order import Position
    from feddra_ds.federation.schedule import stages_of_round

    run, out = build_run(config_tree), []
    for index in order:
        client = run.clients[index]
        client.position, client.aligner = Position(0, 0), None
        for stage in stages_of_round(run.config, 0):
            run.trainer.run_stage(client, stage, run.server.model_of(client), 1.0)
        out.append(pieces_of(run.engine))
    finish(run)
    return out


# ---- which weights move
def _moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, set[str]]:
    """Per part, the parameters of which any bit differs; and those that stayed."""
    out: dict[str, set[str]] = {"aligner": set(), "backbone": set(), "still": set()}
    for name in before:
        same = before[name].tobytes() == after[name].tobytes()
        out["still" if same else name.split(".")[0]].add(name)
    return out


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stage_1_moves_no_bit_of_the_backbone_and_stage_2_moves_everything(
    dataset: Path, tmp_path: Path, world_size: int
) -> None:
    stages = range(4) if world_size == 1 else (2, 3)
    more = {"schedule__rounds": 2, "topology__ranks_per_slot": world_size, "evaluation__every": 0, **ADAMW}
    jobs = [(tree(dataset, tmp_path / str(zero_), deepspeed=zero(zero_), **more),) for zero_ in stages]
    for by_rank in on_each(watched, jobs, world_size=world_size):
        assert [s["stage"] for s in by_rank[0]["stages"]] == 2 * (3 * ["stage1"] + 3 * ["stage2"])
        for number, stage in enumerate(by_rank[0]["stages"]):
            before, after = (assemble([r["stages"][number][key] for r in by_rank]) for key in ("before", "after"))
            moved = _moved(before, after)
            if stage["stage"] == "stage1":
                assert moved["backbone"] == set(), f"stage 1 of {stage['client']} moved the backbone"
                assert moved["still"] == {name for name in before if name.startswith("backbone.")}
            else:
                assert moved["still"] == set(), f"{stage['client']} in stage 2 leaves parameters as they were"


def test_without_anchors_and_momentum_a_part_still_moves_only_in_its_stage(dataset: Path, tmp_path: Path) -> None:
    more = {"optimizer__momentum": 0.9, "objective__anchor_weight": 0.0, "schedule__stage2_start": "global", **FASTER}
    (by_rank,) = on_each(watched, [(tree(dataset, tmp_path, deepspeed=zero(1), **more),)])
    for stage in by_rank[0]["stages"]:
        moved = _moved(assemble([stage["before"]]), assemble([stage["after"]]))
        assert bool(moved["backbone"]) == (stage["stage"] == "stage2")
        assert moved["aligner"]
    first = {s["client"]: s for s in by_rank[0]["stages"][3:6]}
    starts = [assemble([first[client]["before"]]) for client in IDS]
    assert same_bits(starts[0], starts[1]), "stage2_start = global: every client starts from the aggregated aligner"


def test_stage_2_goes_on_with_the_clients_own_aligner(dataset: Path, tmp_path: Path) -> None:
    (by_rank,) = on_each(watched, [(tree(dataset, tmp_path, schedule__rounds=1, **FASTER),)])
    stages = by_rank[0]["stages"]
    for one, two in zip(stages[:3], stages[3:], strict=True):
        assert one["client"] == two["client"]
        after_1, before_2 = assemble([one["after"]]), assemble([two["before"]])
        assert same_bits(after_1, before_2)  # the backbone has not moved, and θ_i is its own


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_clients_result_does_not_depend_on_who_trained_before(dataset: Path, tmp_path: Path, world_size: int) -> None:
    """Client 0 first on an engine, after client 1, and after client 2 on another engine: the same bits."""
    fragments = [zero(0), zero(1, bf16=True), zero(2), zero(3)] if world_size == 1 else [zero(2), zero(3)]
    settings = {"topology__ranks_per_slot": world_size, **ADAMW}
    jobs = [
        (tree(dataset, tmp_path / f"{n}-{order[0]}", deepspeed=f, **settings), order)
        for n, f in enumerate(fragments)
        for order in ([0, 1, 0], [2, 0])
    ]
    seen = on_each(train_clients, jobs, world_size=world_size)
    for (config, _), one, two in zip(jobs[::2], seen[::2], seen[1::2], strict=True):
        first, other, after_another = (assemble([rank[n] for rank in one]) for n in range(3))
        on_a_fresh_engine = assemble([rank[1] for rank in two])
        assert same_bits(first, after_another), config["deepspeed"]
        assert same_bits(first, on_a_fresh_engine), config["deepspeed"]
        assert not same_bits(first, other)


# ---- anchors
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_replayed_and_resident_anchors_agree(dataset: Path, tmp_path: Path, world_size: int) -> None:
    variants = {
        "replay": {},
        "decoded twice": {"data__replay_cache_bytes": 0},
        "resident": {"objective__anchors": "resident"},
        "no anchors": {"objective__anchor_weight": 0.0},
    }
    more = {"topology__ranks_per_slot": world_size, "objective__anchor_weight": 5.0, **FASTER}
    jobs = [
        (tree(dataset, tmp_path / name, deepspeed=zero(3 if world_size == 2 else 0), **(more | change)),)
        for name, change in variants.items()
    ]
    results = dict(zip(variants, on_each(watched, jobs, world_size=world_size), strict=True))
    losses = {name: [s["loss"] for s in by_rank[0]["stages"]] for name, by_rank in results.items()}
    np.testing.assert_allclose(losses["replay"], losses["resident"], atol=1e-5)
    np.testing.assert_allclose(losses["replay"], losses["decoded twice"], atol=1e-7)
    assert np.abs(np.subtract(losses["replay"], losses["no anchors"])).max() > 1e-3
    assert largest_difference(weights_of(tmp_path / "replay", 1), weights_of(tmp_path / "resident", 1)) <= 1e-5
    assert largest_difference(weights_of(tmp_path / "replay", 1), weights_of(tmp_path / "no anchors", 1)) > 1e-4


# ---- where p acts
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_anchors_in_train_mode_take_a_batchnorms_statistics_from_the_batch(
    dataset: Path, tmp_path: Path, world_size: int
) -> None:
    from feddra_ds.checkpoint.format import folder_of
    from feddra_ds.checkpoint.load import SavedModel

    train = {"objective__anchor_mode": "train"}
    variants = {"eval": {}, "replay": train, "resident": {**train, "objective__anchors": "resident"}}
    more = {"topology__ranks_per_slot": 1, "model__head__output_norm": "batchnorm", **FASTER}
    more["objective__anchor_reduction"] = "sum"
    jobs = [(tree(dataset, tmp_path / name, **(more | change)),) for name, change in variants.items()]
    on_each(watched, jobs, world_size=world_size)
    weights = {name: weights_of(tmp_path / name, 1) for name in variants}
    assert largest_difference(weights["replay"], weights["resident"]) <= 1e-5
    assert largest_difference(weights["replay"], weights["eval"]) > 1e-4
    replayed, resident = (SavedModel(folder_of(tmp_path / n, 1), "global").buffers() for n in ("replay", "resident"))
    for name, value in replayed.items():  # the replay's forwards are not counted
        np.testing.assert_allclose(value.numpy(), resident[name].numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_round_says_how_hard_the_anchors_pull(dataset: Path, tmp_path: Path, world_size: int) -> None:
    variants = {
        "mean": {},
        "sum": {"objective__anchor_reduction": "sum"},
        "none": {"objective__anchor_weight": 0.0},
    }
    more = {"topology__ranks_per_slot": world_size, "schedule__rounds": 1}
    jobs = [(tree(dataset, tmp_path / name, **(more | change)),) for name, change in variants.items()]
    on_each(run_all, jobs, world_size=world_size)
    found = {name: metrics_of(tmp_path / name)[0]["anchor_gradient_ratio"] for name in variants}
    assert found["none"] == {"north": None, "south": None, "west": None}
    for client, ratio in found["mean"].items():
        assert 0 < ratio < found["sum"][client] < 16.5 * ratio  # D = 16, and the stronger pull keeps the client nearer


@pytest.mark.slow
def test_feddra_at_radius_0_is_fedavg_with_equal_keys(dataset: Path, tmp_path: Path) -> None:
    two_stages = {"schedule__stage1_steps": 2, "schedule__stage2_steps": 3, "objective__anchor_weight": 1.0}
    runs = {
        "feddra": {"dro__radius": 0.0, "dro__center": "samples"},
        "fedavg": {"strategy__name": "fedavg", **two_stages},
        "uniform": {"strategy__name": "fedavg", "dro__center": "uniform", **two_stages},
        "robust": {"dro__center": "samples"},
    }
    on_each(run_all, [(tree(dataset, tmp_path / name, **ADAMW, **change),) for name, change in runs.items()])
    assert same_bits(weights_of(tmp_path / "feddra", 1), weights_of(tmp_path / "fedavg", 1))
    assert metrics_of(tmp_path / "feddra") == metrics_of(tmp_path / "fedavg")
    for line in metrics_of(tmp_path / "fedavg"):
        assert line["client_weights"] == line["next_client_weights"] == [24 / 72, 20 / 72, 28 / 72]  # by training pairs
    for line in metrics_of(tmp_path / "uniform"):
        assert line["client_weights"] == line["next_client_weights"] == [1 / 3, 1 / 3, 1 / 3]
    for other in ("uniform", "robust"):
        assert not same_bits(weights_of(tmp_path / "feddra", 1), weights_of(tmp_path / other, 1))


def test_centralized_trains_on_as_many_pairs_as_the_federation(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__rounds": 1, "evaluation__every": 0}
    runs = {
        "fedavg": {"strategy__name": "fedavg"},
        "centralized": {"strategy__name": "centralized"},
        "client": {"strategy__name": "centralized", "strategy__budget": "client"},
    }
    on_each(run_all, [(tree(dataset, tmp_path / name, **more, **change),) for name, change in runs.items()])
    samples = {name: metrics_of(tmp_path / name)[0]["samples"] for name in runs}
    assert samples == {"fedavg": 3 * 5 * 8, "centralized": 3 * 5 * 8, "client": 5 * 8}
    progress = json.loads((tmp_path / "centralized" / "progress.json").read_text())
    assert (progress["fraction_done"], progress["num_steps"]) == (1.0, 3 * 3)  # of stage 2


@pytest.mark.slow
def test_weights_at_a_vertex_give_that_clients_model(dataset: Path, tmp_path: Path) -> None:
    vertex = {"dro__fixed_weights": [0.0, 1.0, 0.0], **ADAMW}
    alone = {"clients__ids": ["south"], **ADAMW}
    on_each(run_all, [(tree(dataset, tmp_path / "vertex", **vertex),), (tree(dataset, tmp_path / "alone", **alone),)])
    on_ranks(run_all, 2, tree(dataset, tmp_path / "slots", topology__ranks_per_slot=1, **vertex))
    expected = weights_of(tmp_path / "alone", 1)
    assert largest_difference(expected, weights_of(tmp_path / "vertex", 1)) <= 1e-7
    assert largest_difference(expected, weights_of(tmp_path / "slots", 1)) <= 1e-7
    assert [line["client_weights"] for line in metrics_of(tmp_path / "vertex")] == 2 * [[0.0, 1.0, 0.0]]


def test_p_acts_in_the_average_in_the_loss_or_in_both(dataset: Path, tmp_path: Path) -> None:
    """One SGD step: θ_i = θ − lr·g_i from runs of one client each, and p's effect predicted from them."""
    p, n = [0.5, 0.3, 0.2], 3
    step = {"schedule__rounds": 1, "schedule__stage1_steps": 0, "schedule__stage2_steps": 1, "optimizer__lr": 0.1}
    jobs = [(tree(dataset, tmp_path / client, clients__ids=[client], **step),) for client in IDS]
    for apply in ("aggregate", "loss", "both"):
        change = {"dro__fixed_weights": p, "dro__apply": apply}
        jobs.append((tree(dataset, tmp_path / apply, **step, **change),))
    by_job = on_each(watched, jobs)
    start = assemble([by_job[0][0]["stages"][0]["before"]])
    moves = [
        {k: v.astype(np.float64) - start[k] for k, v in weights_of(tmp_path / client, 0).items()} for client in IDS
    ]
    factors = {"aggregate": p, "loss": p, "both": [n * x * x for x in p]}
    for apply, weight in factors.items():
        predicted = {k: start[k] + sum(w * m[k] for w, m in zip(weight, moves, strict=True)) for k in start}
        found = weights_of(tmp_path / apply, 0)
        assert largest_difference(predicted, found) <= 1e-6, apply
        assert largest_difference(start, found) > 1e-2
    uniform = {k: start[k] + sum(m[k] for m in moves) / n for k in start}
    assert largest_difference(uniform, weights_of(tmp_path / "loss", 0)) > 1e-3


@pytest.mark.slow
def test_p_in_the_loss_moves_with_the_rounds(dataset: Path, tmp_path: Path) -> None:
    """Two rounds, to see that the loss is scaled by the p of the round that runs, on one rank and on two slots."""
    more = {"dro__apply": "loss", "dro__step_size": 5.0, **FASTER}
    on_each(run_all, [(tree(dataset, tmp_path / "one", **more),)])
    on_ranks(run_all, 2, tree(dataset, tmp_path / "two", topology__ranks_per_slot=1, **more))
    on_each(run_all, [(tree(dataset, tmp_path / "aggregate", dro__step_size=5.0, **FASTER),)])
    assert largest_difference(weights_of(tmp_path / "one", 1), weights_of(tmp_path / "two", 1)) <= 1e-5
    assert np.ptp(metrics_of(tmp_path / "one")[1]["client_weights"]) > 1e-3
    assert largest_difference(weights_of(tmp_path / "one", 1), weights_of(tmp_path / "aggregate", 1)) > 1e-6
