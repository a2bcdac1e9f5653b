"""The server average: by hand, over slots and shards, without the clients whose update is bad, with its buffers and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    Fault,
    assemble,
    largest_difference,
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

IDS = ["north", "south", "west"]
FASTER = {"optimizer__lr": 0.03}
P = [0.5, 0.3, 0.2]


def _results(by_rank: list[dict[str, Any]], per_slot: int, round_index: int, stage: str) -> dict[str, dict[str, Any]]:
    """By client: its whole `weights` after a stage, and what its slot's leader saw."""
    out: dict[str, dict[str, Any]] = {}
    for leader in range(0, len(by_rank), per_slot):
        slot = by_rank[leader : leader + per_slot]
        for number, seen in enumerate(slot[0]["stages"]):
            if (seen["round"], seen["stage"]) == (round_index, stage):
                out[seen["client"]] = seen | {"weights": assemble([r["stages"][number]["after"] for r in slot])}
    return out


def _mean(results: dict[str, dict[str, Any]], p: dict[str, float]) -> dict[str, np.ndarray]:
    """Σ p_i θ_i / Σ p_i in float64."""
    total = sum(p.values())
    names = results[next(iter(p))]["weights"]
    return {n: sum(w * results[c]["weights"][n].astype(np.float64) for c, w in p.items()) / total for n in names}


@pytest.mark.parametrize(
    ("world_size", "per_slot", "stage"),
    [pytest.param(1, 1, 0, marks=pytest.mark.slow), (2, 1, 1), pytest.param(4, 2, 3, marks=pytest.mark.slow)],
)
def test_the_new_model_is_the_weighted_mean_of_the_clients(
    dataset: Path, tmp_path: Path, world_size: int, per_slot: int, stage: int
) -> None:
    config = tree(dataset, tmp_path, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, **FASTER)
    by_rank = on_ranks(watched, world_size, config)
    for line in metrics_of(tmp_path):
        results = _results(by_rank, per_slot, line["round"], "stage2")
        assert sorted(results) == IDS
        p = dict(zip(IDS, line["client_weights"], strict=True))
        expected = _mean(results, p)
        assert largest_difference(expected, weights_of(tmp_path, line["round"])) <= 1e-6
        assert largest_difference(expected, results["north"]["weights"]) > 1e-3
    if world_size == 1:  # stage 1's mean is what the anchors and the next stage see
        stage_1 = _mean(_results(by_rank, 1, 1, "stage1"), p)
        starts = {s["client"]: assemble([s["before"]]) for s in by_rank[0]["stages"] if s["stage"] == "stage2"}
        assert largest_difference(stage_1, starts["north"]) > 1e-3  # its own aligner, not the mean


def test_fedavg_averages_by_training_pairs(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, strategy__name="fedavg", **FASTER)
    (by_rank,) = on_each(watched, [(config,)])
    for line in metrics_of(tmp_path):
        expected = _mean(_results(by_rank, 1, line["round"], "stage2"), {"north": 24, "south": 20, "west": 28})
        assert largest_difference(expected, weights_of(tmp_path, line["round"])) <= 1e-6


def test_stage_2_starts_from_the_average_where_it_is_asked_to_whatever_moves_p(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__stage2_start": "global", "dro__evaluate_on": "anchors", **FASTER}
    (by_rank,) = on_each(watched, [(tree(dataset, tmp_path, **more),)])
    second = metrics_of(tmp_path)[1]
    mean = _mean(_results(by_rank, 1, 1, "stage1"), dict(zip(IDS, second["client_weights"], strict=True)))
    starts = [assemble([s["before"]]) for s in by_rank[0]["stages"] if (s["round"], s["stage"]) == (1, "stage2")]
    assert len(starts) == len(IDS)
    for start in starts:
        assert largest_difference(mean, start) <= 1e-6


@pytest.mark.parametrize(("world_size", "per_slot"), [(1, 1), (4, 2)])
def test_a_client_with_nan_weights_is_left_out_with_a_reason(
    dataset: Path, tmp_path: Path, world_size: int, per_slot: int
) -> None:
    config = tree(
        dataset, tmp_path, deepspeed=zero(2), topology__ranks_per_slot=per_slot, dro__fixed_weights=P, **FASTER
    )
    fault = Fault("south", "weights", round=0, stage="stage2", slot_rank=per_slot - 1)  # of two ranks the second alone
    by_rank = on_ranks(watched, world_size, config, [fault])
    first, second = metrics_of(tmp_path)
    assert first["excluded_clients"] == [{"id": "south", "reason": "its weights are not finite after the stage"}]
    assert second["excluded_clients"] == []
    results = _results(by_rank, per_slot, 0, "stage2")
    assert [results[c]["problem"] is None for c in IDS] == [True, False, True]
    expected = _mean(results, {"north": P[0], "west": P[2]})
    assert largest_difference(expected, weights_of(tmp_path, 0)) <= 1e-6
    assert first["client_weights"] == P
    assert np.isfinite(second["client_losses"]).all()
    later = _results(by_rank, per_slot, 1, "stage2")
    assert largest_difference(_mean(later, dict(zip(IDS, P, strict=True))), weights_of(tmp_path, 1)) <= 1e-6


def test_padding_is_nobodys_business(dataset: Path, tmp_path: Path) -> None:
    """ZeRO's padding may hold anything: it must not make an update invalid."""
    # a learned temperature makes the number of parameters odd, so that there is padding
    odd = {"objective__learnable_temperature": True}
    config = tree(dataset, tmp_path, deepspeed=zero(2), topology__ranks_per_slot=2, **odd)
    assert (
        on_ranks(_validate_with_bad_padding, 2, config)
        == [(True, None, "its weights are not finite after the stage")] * 2
    )


def _validate_with_bad_padding(config_tree: dict[str, Any]) -> tuple[bool, str | None, str | None]:
    from helpers import build_run, finish

    from feddra_ds.federation.aggregation.admission import validate_update

    run = build_run(config_tree)
    padded = 0
    for part in ("aligner", "backbone"):
        kept = [(view, view.clone()) for _, view in run.engine.views(part)]
        for tensor in run.engine.slices(part):
            padded += tensor.numel()
            tensor.fill_(float("nan"))
        for view, values in kept:
            view.copy_(values)
            padded -= view.numel()
    first = validate_update(run.engine, run.topology, ("aligner", "backbone"))
    if run.topology.slot_rank == 1:
        next(iter(run.engine.views("backbone")))[1][-1] = float("inf")
    second = validate_update(run.engine, run.topology, ("aligner", "backbone"))
    some = run.topology.rank == 0 or padded > 0  # the padding is at the end, so on the last rank
    finish(run)
    return some, first, second


@pytest.mark.parametrize(("world_size", "per_slot"), [(1, 1), (2, 1), (4, 2)])
def test_too_few_clients_stop_every_rank_with_names(
    dataset: Path, tmp_path: Path, world_size: int, per_slot: int
) -> None:
    config = tree(dataset, tmp_path, topology__ranks_per_slot=per_slot, clients__minimum=3)
    by_rank = on_ranks(watched, world_size, config, [Fault("west", "weights", round=1, stage="stage1")])
    message = (
        "round 1, stage1: 2 clients gave a valid update, clients.minimum is 3; "
        "west: its weights are not finite after the stage"
    )
    assert [seen["error"] for seen in by_rank] == world_size * [message]
    assert len(metrics_of(tmp_path)) == 1  # round 0 is whole


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_clients_of_weight_zero_alone_are_averaged_by_the_centre(dataset: Path, tmp_path: Path, precision: str) -> None:
    more = {"schedule__rounds": 1, "aggregate__precision": precision, **FASTER}
    config = tree(dataset, tmp_path / "zero", dro__fixed_weights=[0.0, 0.0, 1.0], **more)
    faults = [Fault("west", "weights", stage=stage) for stage in ("stage1", "stage2")]
    (by_rank,) = on_each(watched, [(config, faults)])
    assert by_rank[0]["error"] is None
    line = metrics_of(tmp_path / "zero")[0]
    assert line["client_weights"] == [0.0, 0.0, 1.0]
    assert [item["id"] for item in line["excluded_clients"]] == ["west"]  # for one reason, said once
    two = tree(dataset, tmp_path / "two", clients__ids=["north", "south"], dro__fixed_weights=[0.5, 0.5], **more)
    on_each(watched, [(two, [])])
    assert largest_difference(weights_of(tmp_path / "zero", 0), weights_of(tmp_path / "two", 0)) <= 1e-6


# ---- bad steps
def test_a_nan_on_one_rank_skips_the_step_on_all(dataset: Path, tmp_path: Path) -> None:
    config = tree(
        dataset, tmp_path, deepspeed=zero(2), topology__ranks_per_slot=2, optimizer__max_skipped_steps=2, **FASTER
    )
    faults = [
        Fault("south", "batch", steps=(0, 1), slot_rank=1),
        Fault("west", "batch", steps=(0, 2), slot_rank=1),
        Fault("north", "batch", stage="stage1", steps=(1,), slot_rank=0),
    ]
    by_rank = on_ranks(watched, 4, config, faults)
    first, second = metrics_of(tmp_path)
    reason = "2 steps in a row had a non-finite loss or gradient (optimizer.max_skipped_steps)"
    assert first["excluded_clients"] == [{"id": "south", "reason": reason}]
    assert second["excluded_clients"] == []
    results = _results(by_rank, 2, 0, "stage2")
    assert {c: r["pairs"] for c, r in results.items()} == {"north": 24, "south": 8, "west": 8}
    assert first["samples"] == (8 + 16 + 16) + (24 + 8 + 8)  # of good steps, in both stages
    assert first["skipped_steps"] == {"north": {"stage1": 1}, "south": {"stage2": 2}, "west": {"stage2": 2}}
    assert second["skipped_steps"] == {}
    assert all(np.isfinite(r["loss"]) for r in results.values())
    assert all(np.isfinite(v).all() for v in weights_of(tmp_path, 1).values())
    p = dict(zip(IDS, first["client_weights"], strict=True))
    del p["south"]
    assert largest_difference(_mean(results, p), weights_of(tmp_path, 0)) <= 1e-6


@pytest.mark.parametrize(
    ("world_size", "stage", "changes", "backward"),
    [
        (2, 0, {}, 1),
        pytest.param(2, 3, {}, 1, marks=pytest.mark.slow),
        pytest.param(1, 0, {"data__micro_batch_size": 4}, 3, marks=pytest.mark.slow),
    ],  # the second micro-batch of step 1
)
def test_a_gradient_that_is_not_finite_skips_the_step_at_every_zero_stage(
    dataset: Path, tmp_path: Path, world_size: int, stage: int, changes: dict[str, Any], backward: int
) -> None:
    changes = {"deepspeed": zero(stage), "topology__ranks_per_slot": world_size, "schedule__rounds": 1} | changes
    fault = Fault("south", "gradient", steps=(backward,), slot_rank=world_size - 1)
    by_rank = on_ranks(watched, world_size, tree(dataset, tmp_path, **changes), [fault])
    (line,) = metrics_of(tmp_path)
    assert (line["excluded_clients"], line["skipped_steps"]) == ([], {"south": {"stage2": 1}})
    assert line["samples"] == 3 * (16 + 24) - 8
    results = _results(by_rank, world_size, 0, "stage2")
    assert np.isfinite(results["south"]["loss"])
    expected = _mean(results, dict(zip(IDS, line["client_weights"], strict=True)))
    assert largest_difference(expected, weights_of(tmp_path, 0)) <= 1e-6


def test_a_client_that_never_stepped_is_left_out_however_short_its_stage(dataset: Path, tmp_path: Path) -> None:
    config = tree(
        dataset, tmp_path, aggregate__after_stage1=False, **FASTER
    )  # max_skipped_steps is 5, beyond both stages
    faults = [Fault("south", "batch", steps=(0, 1, 2)), Fault("west", "batch", stage="stage1", steps=(0, 1))]
    (by_rank,) = on_each(watched, [(config, faults)])
    first, second = metrics_of(tmp_path)
    reason = "all 3 steps of stage2 were skipped, as their loss or gradient was not finite"
    assert first["excluded_clients"] == [{"id": "south", "reason": reason}]
    assert first["skipped_steps"] == {"south": {"stage2": 3}, "west": {"stage1": 2}}  # stage 1 is not averaged
    assert (second["excluded_clients"], second["skipped_steps"]) == ([], {})
    results = _results(by_rank, 1, 0, "stage2")
    p = dict(zip(IDS, first["client_weights"], strict=True))
    del p["south"]
    assert largest_difference(_mean(results, p), weights_of(tmp_path, 0)) <= 1e-6


def test_when_every_step_of_every_client_is_bad_all_ranks_stop_alike(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, topology__ranks_per_slot=2, optimizer__max_skipped_steps=2)
    faults = [Fault(client, "batch", stage="stage1", steps=(0, 1), slot_rank=1) for client in IDS]
    errors = {seen["error"] for seen in on_ranks(watched, 4, config, faults)}
    (error,) = errors
    assert error == (
        "round 0, stage1: 0 clients gave a valid update, clients.minimum is 1; "
        "north, south, west: all 2 steps of stage1 were skipped, as their loss or gradient was not finite"
    )


# ---- buffers
BATCHNORM = {"model__head__norm": "batchnorm", **FASTER}


def _buffers_of(out: Path, round_index: int) -> dict[str, np.ndarray]:
    from feddra_ds.checkpoint.format import folder_of
    from feddra_ds.checkpoint.load import SavedModel

    return {
        name: tensor.numpy() for name, tensor in SavedModel(folder_of(out, round_index), "global").buffers().items()
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_running_statistics_are_averaged_and_counters_come_from_the_first_client(
    dataset: Path, tmp_path: Path, world_size: int
) -> None:
    config = tree(dataset, tmp_path, topology__ranks_per_slot=1, dro__fixed_weights=P, **BATCHNORM)
    results = _results(on_ranks(watched, world_size, config), 1, 1, "stage2")
    found = _buffers_of(tmp_path, 1)
    assert {name.rsplit(".", 1)[1] for name in found} == {"running_mean", "running_var", "num_batches_tracked"}
    for name, value in found.items():
        if value.dtype == np.int64:
            assert value == results["north"]["buffers"][name] == 10, name  # 2 rounds of 2 + 3 steps
        else:
            expected = sum(w * results[c]["buffers"][name].astype(np.float64) for c, w in zip(IDS, P, strict=True))
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
            assert np.abs(value - results["north"]["buffers"][name]).max() > 3e-4


def test_buffers_without_the_first_client_and_with_bad_ones(dataset: Path, tmp_path: Path) -> None:
    """A counter stays as it was when its client is left out; statistics that are not finite leave a client out."""
    config = tree(dataset, tmp_path, **BATCHNORM)
    faults = [Fault("north", "weights", round=1), Fault("west", "buffers", round=1)]
    (by_rank,) = on_each(watched, [(config, faults)])
    excluded = metrics_of(tmp_path)[1]["excluded_clients"]
    assert sorted(item["id"] for item in excluded) == ["north", "west"]
    results = _results(by_rank, 1, 1, "stage2")
    for name, value in _buffers_of(tmp_path, 1).items():
        if value.dtype == np.int64:
            assert value == 7, name  # round 0 and stage 1 of round 1, the last that north's update went into
        else:
            np.testing.assert_allclose(value, results["south"]["buffers"][name], rtol=1e-6)


# ---- bytes
@pytest.mark.slow
def test_bytes_are_those_of_this_ranks_slices(dataset: Path, tmp_path: Path) -> None:
    """fp32 aligner after stage 1, all of it after stage 2: whole on slots of one rank, half on slots of two."""
    by_layout = {}
    for world_size, per_slot in ((1, 1), (2, 1), (4, 2)):
        out = tmp_path / str(world_size)
        config = tree(dataset, out, deepspeed=zero(2), topology__ranks_per_slot=per_slot)
        on_ranks(run_all, world_size, config)
        by_layout[world_size] = [line["bytes_sent_per_rank"] for line in metrics_of(out)]
        assert by_layout[world_size] == [predicted_bytes(config, world_size)] * 2
    sizes = {name: len(values) for name, values in weights_of(tmp_path / "1", 0).items()}
    aligner = sum(n for name, n in sizes.items() if name.startswith("aligner."))
    expected = 4 * (aligner + sum(sizes.values()))
    assert by_layout[1] == [0, 0]
    assert by_layout[2] == pytest.approx([expected, expected], rel=1e-3)
    assert by_layout[4] == pytest.approx([expected / 2, expected / 2], rel=1e-3)
