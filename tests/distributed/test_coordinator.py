"""Membership: a slot that does not report costs one bounded wait, and the rest go on, or stop with names."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    NUM_VAL,
    Fault,
    build_run,
    finish,
    inject,
    largest_difference,
    metrics_of,
    on_each,
    on_ranks,
    pieces_of,
    run_all,
    tree,
    weights_of,
)
from spawn import free_port

IDS = ["north", "south", "west"]
WAIT = 12.0  # clients.timeout_s: long beside a stage of these runs, short beside the test
SETTINGS = {"topology__ranks_per_slot": 1, "optimizer__lr": 0.03, "clients__timeout_s": WAIT}


# ---- inside a rank
def with_a_sleeper(config_tree: dict[str, Any], sleeper: int, round_index: int, stage_name: str) -> dict[str, Any]:
    """All rounds; in one of them rank `sleeper` trains so slowly that the coordinator decides without it."""
    from feddra_ds.common.errors import TooFewClients, WaitTimeout

    run = build_run(config_tree)
    run_stage, all_clients = run.trainer.run_stage, run.run_stage
    after: dict[tuple[int, str], dict[str, Any]] = {}
    now = {}

    def slow(client: Any, stage: Any, *args: Any, **kwargs: Any) -> Any:
        if (run.topology.rank, now["round"], stage.name) == (sleeper, round_index, stage_name):
            run.topology.fetch(f"round/{round_index}/{stage_name}/decision", sender="the test", timeout_s=90)
        result = run_stage(client, stage, *args, **kwargs)
        after.setdefault((now["round"], stage.name), {})[client.id] = pieces_of(run.engine)
        return result

    def count(number: int, stage: Any) -> int:
        now["round"] = number
        return all_clients(number, stage)

    run.trainer.run_stage, run.run_stage = slow, count
    decisions: dict[tuple[int, str], float] = {}
    if run.coordinator is not None:
        decide = run.coordinator.decide

        def timed(number: int, stage: str) -> Any:
            began = time.monotonic()
            decision = decide(number, stage)
            decisions[number, stage] = time.monotonic() - began
            return decision

        run.coordinator.decide = timed
    error = None
    try:
        run.rounds()
        finish(run)
    except (TooFewClients, WaitTimeout) as stopped:  # the coordinator does not wait for the sleeper to hear why it ends
        error = str(stopped)
    return {"after": after, "error": error, "live": run.topology.live_slots, "decisions": decisions}


def with_slow_readers(config_tree: dict[str, Any]) -> tuple[str, float]:
    """A run that has to stop, on ranks that read the coordinator's decision only seconds after it was made.

    Returns why it stopped, and when the rank had read it, on the host's one clock; the coordinator: when it left.
    """
    from feddra_ds.common.errors import TooFewClients

    run = build_run(config_tree)
    fetch, read_at = run.topology.fetch, []

    def late(key: str, **kwargs: Any) -> Any:
        if not key.endswith("/decision"):
            return fetch(key, **kwargs)
        time.sleep(2.0)
        value = fetch(key, **kwargs)
        read_at.append(time.monotonic())
        return value

    run.topology.fetch = late
    with inject([Fault("every", "weights")], run, run.clients[0]), pytest.raises(TooFewClients) as error:
        run.rounds()
    return str(error.value), time.monotonic() if run.coordinator is not None else read_at[-1]


def positions_after_a_resume(config_tree: dict[str, Any]) -> dict[str, Any]:
    """What the coordinator would save if it lost every slot in the first round after a resume."""
    run = build_run(config_tree)
    positions = run.coordinator.state(9)["positions"]
    finish(run)
    return positions


def with_reports(config_tree: dict[str, Any], told: dict[str, list[float]]) -> None:
    """All rounds, in which each client reports the losses that `told` has for it, a number a round, of training pairs."""
    from feddra_ds.federation.protocol import Loss

    run = build_run(config_tree, clips=True)
    numbers = {name: iter(values) for name, values in told.items()}
    run.loss_of = lambda data, draw: Loss(next(numbers[data.source.name]), 0.1)
    run.rounds()
    finish(run)


# ---- tests
@pytest.mark.parametrize(
    "ascent", ["exponentiated", *(pytest.param(x, marks=pytest.mark.slow) for x in ("projected", "closed_form"))]
)
def test_no_report_is_believed_blindly(dataset: Path, tmp_path: Path, ascent: str) -> None:
    chance = 2 * math.log(NUM_VAL)  # dro.evaluation_batch_size
    more = {"schedule__rounds": 1, "dro__ascent": ascent, "dro__evaluate_on": "train", **SETTINGS}
    after = {}
    for name, lie in (("chance", chance), ("huge", 1e30), ("nan", math.nan), ("negative", -1.0), ("endless", math.inf)):
        told = {"north": [3.0], "south": [lie], "west": [2.0]}
        on_ranks(with_reports, 2, tree(dataset, tmp_path / name, **more), told)
        (line,) = metrics_of(tmp_path / name)
        after[name] = line["next_client_weights"]
        assert sum(after[name]) == pytest.approx(1, abs=1e-12)
        reported = line["clipped_losses"]
        if name == "chance":
            assert reported == []
            gain = line["robust_gain"]
            assert gain["best"] * (1 + 1e-12) >= gain["mixture"] > gain["mean"]
        elif name == "huge":
            assert reported == [{"id": "south", "reported": 1e30, "used": pytest.approx(chance)}]
            assert line["client_losses"][1] == 1e30
        else:
            said = {"nan": "nan", "negative": -1.0, "endless": "inf"}[name]
            assert reported == [{"id": "south", "reported": said, "used": None}]
            assert after[name][1] == pytest.approx(1 / 3, abs=1e-12)
            assert after[name][0] > 1 / 3 > after[name][2]
        assert (line["client_losses"][1] is None) == (name in ("nan", "endless"))
    assert after["huge"] == after["chance"]


@pytest.mark.slow
def test_a_slot_that_does_not_report_is_dropped_and_the_others_regroup(dataset: Path, tmp_path: Path) -> None:
    from feddra_ds.run.metrics_file import read_metrics

    config = tree(dataset, tmp_path, schedule__rounds=3, **SETTINGS)
    by_rank = on_ranks(with_a_sleeper, 3, config, 1, 1, "stage2")
    assert [seen["error"] for seen in by_rank] == [
        None,
        "slot 1 was dropped: it did not report within clients.timeout_s",
        None,
    ]
    assert by_rank[0]["live"] == by_rank[2]["live"] == (0, 2)
    first, second, third = metrics_of(tmp_path)
    late = f"slot 1 did not report within clients.timeout_s = {WAIT:g} s"
    assert first["excluded_clients"] == []
    assert second["excluded_clients"] == [{"id": "south", "reason": late}]
    assert third["excluded_clients"] == [{"id": "south", "reason": "slot 1 was dropped in an earlier round"}]

    # the average of round 1 and 2 is over the others, p renormalised; the mass of the lost client stays with it
    for line in (second, third):
        results = {c: by_rank[r]["after"][line["round"], "stage2"][c] for r, c in ((0, "north"), (2, "west"))}
        p = np.array([line["client_weights"][i] for i in (0, 2)])
        p /= p.sum()
        mean = {
            a[0]: p[0] * a[2].astype(np.float64) + p[1] * b[2]
            for a, b in zip(results["north"], results["west"], strict=True)
        }
        assert largest_difference(mean, weights_of(tmp_path, line["round"])) <= 1e-6
        assert line["client_losses"][1] is None
        assert line["mean_loss"] == pytest.approx(np.mean([line["client_losses"][i] for i in (0, 2)]))
        assert line["next_client_weights"][1] == second["client_weights"][1]
        assert sum(line["next_client_weights"]) == pytest.approx(1.0, abs=1e-12)
        assert "south" not in line["val"]
        assert line["val"]["all"]["pairs"] == 12
    assert third["client_weights"] != second["client_weights"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")[1]["peak_memory_bytes"]) == 2

    # one wait of WAIT seconds, in the stage in which it was lost
    waited = by_rank[0]["decisions"]
    assert WAIT <= waited.pop((1, "stage2")) < WAIT + 3
    assert max(waited.values()) < WAIT

    # all come back in the next run, and go on where they were
    (resumed,) = on_each(
        run_all, [(tree(dataset, tmp_path, schedule__rounds=4, **(SETTINGS | {"run__resume": "auto"})),)]
    )
    assert resumed[0]["first_round"] == 3
    line = metrics_of(tmp_path)[3]
    assert line["excluded_clients"] == []
    assert None not in line["client_losses"]


@pytest.mark.slow
def test_a_client_that_was_never_heard_of_does_not_break_the_resume(dataset: Path, tmp_path: Path) -> None:
    on_ranks(with_a_sleeper, 2, tree(dataset, tmp_path, schedule__rounds=1, **SETTINGS), 1, 0, "stage1")
    assert [item["id"] for item in metrics_of(tmp_path)[0]["excluded_clients"]] == ["south"]
    config = tree(dataset, tmp_path, schedule__rounds=2, **SETTINGS)
    ((positions,),) = on_each(positions_after_a_resume, [(config,)])
    assert sorted(positions) == ["north", "west"]
    on_each(run_all, [(config,)])
    assert metrics_of(tmp_path)[1]["excluded_clients"] == []


def test_positions_outlive_a_round_in_which_their_client_is_lost(dataset: Path, tmp_path: Path) -> None:
    on_each(run_all, [(tree(dataset, tmp_path, schedule__rounds=1),)])
    saved = json.loads((tmp_path / "checkpoints/round-000000/coordinator.json").read_text())["positions"]
    assert sorted(saved) == IDS
    ((positions,),) = on_each(positions_after_a_resume, [(tree(dataset, tmp_path, schedule__rounds=2),)])
    assert positions == saved


@pytest.mark.slow
def test_a_lost_slot_stops_the_run_where_too_few_are_left(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, clients__minimum=3, **SETTINGS)
    errors = [seen["error"] for seen in on_ranks(with_a_sleeper, 2, config, 1, 0, "stage1")]
    assert errors[0] == (
        "round 0, stage1: 2 clients gave a valid update, clients.minimum is 3; "
        f"south: slot 1 did not report within clients.timeout_s = {WAIT:g} s"
    )


def test_a_stop_is_heard_by_all_before_the_coordinator_ends(dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, schedule__stage1_steps=0, topology__ranks_per_slot=2)
    by_rank = on_ranks(with_slow_readers, 4, config)
    (message,) = {message for message, _ in by_rank}
    assert message.startswith(
        "round 0, stage2: 0 clients gave a valid update, clients.minimum is 1; north, south, west: its weights"
    )
    left, *read = [when for _, when in by_rank]
    assert left >= max(read), "the coordinator, which serves the store, left before the others had read why"


# ---- real processes, really killed
def _start(dataset: Path, out: Path, rank: int, port: int, world_size: int, **changes: Any) -> tuple[Any, Path]:
    path, log = out.parent / f"{out.name}-{rank}.yaml", out.parent / f"{out.name}-{rank}.log"
    path.write_text(json.dumps(tree(dataset, out, **changes)))  # JSON is YAML
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    names = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "feddra_ds", "train", "--config", str(path)],
            stdout=file,
            stderr=file,
            env={**os.environ, **names, **{key: str(value) for key, value in place.items()}},
        )
    return process, log


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_killed_rank(dataset: Path, tmp_path: Path, victim: int) -> None:
    """Of a client's slot, in stage 1: the others finish. Of the coordinator: the others end, with its name, in a bounded time."""
    port, out = free_port(), tmp_path / "run"
    more = {**SETTINGS, "schedule__rounds": 6, "schedule__stage1_steps": 60, "clients__timeout_s": 20.0}
    ranks = [_start(dataset, out, rank, port, 3, **more) for rank in range(3)]
    try:
        deadline = time.monotonic() + 240
        while len(metrics_of(out)) < 2:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process, _ in ranks), ranks[0][1].read_text()[-2000:]
            time.sleep(0.02)
        ranks[victim][0].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes = [process.wait(240) for process, _ in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
    assert codes[victim] == -signal.SIGKILL
    if victim == 0:
        assert codes[1:] == [1, 1]
        assert time.monotonic() - began < 60
        told = [log.read_text().count("lost the coordinator (rank 0)") for _, log in ranks]
        assert sum(told) == 1, f"not once, by the first of the others: {told}"
        return
    assert [codes[0], codes[2]] == [0, 0], ranks[0][1].read_text()[-3000:]
    lines = metrics_of(out)
    assert len(lines) == 6
    assert lines[-1]["excluded_clients"] == [{"id": "south", "reason": "slot 1 was dropped in an earlier round"}]
    first = next(line for line in lines if line["excluded_clients"])
    assert "did not report within clients.timeout_s = 20 s" in first["excluded_clients"][0]["reason"]
