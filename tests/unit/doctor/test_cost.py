"""The cost of a round: its bytes against those of real runs are in tests/distributed/test_aggregate.py and the like."""

from __future__ import annotations

import functools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from run_helpers import make_config, make_data, make_line, make_run

from feddra_ds.cli import main
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import dump
from feddra_ds.config.schema import Config
from feddra_ds.distributed.plan import Plan
from feddra_ds.doctor.cost import Link, RoundCost, _all_reduce, crossings, rates_of, round_cost, seconds_of
from feddra_ds.doctor.hosts import hosts_of, what_lies_where
from feddra_ds.doctor.memory.verdict import meta_model
from feddra_ds.model.dual_encoder import DualEncoder

FAST, FAR = Link(1e12, 0.0), Link(1e12, 0.1)


def config_of(**sections: Any) -> Config:
    return make_config(Path("run"), Path("data"), **sections)


@functools.cache  # no section that these tests change is the model's
def model() -> DualEncoder:
    return meta_model(config_of())


def cost_of(layout: Plan, hosts: list[str], link: Link = FAST, **sections: Any) -> RoundCost:
    return round_cost(config_of(**sections), model(), layout, hosts, link)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2x2", "host0 host0 host1 host1"), ("a:1,b:2", "a b b"), ("10.0.0.1:2", "10.0.0.1 10.0.0.1")],
)
def test_hosts(text: str, expected: str) -> None:
    assert hosts_of(text) == expected.split()


def test_hosts_of_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\nhospital-a slots=2\n\nhospital-b slots=1  # a small one\n")
    assert hosts_of(str(tmp_path / "hosts")) == ["hospital-a", "hospital-a", "hospital-b"]
    (tmp_path / "hosts").write_text("a slot=2\n")
    with pytest.raises(ValueError, match=r"line 1: must be `NAME slots=N`, got 'a slot=2'"):
        hosts_of(str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "'a' is no file"),
        ("a:x", "'a:x' is no file"),
        ("", "'' is no file"),
        ("0x8", "0x8 has no rank"),
        ("a:1,b:1,a:1", "a:1,b:1,a:1 has a more than once"),
    ],
)
def test_hosts_that_are_none(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"--hosts: {expected}"):
        hosts_of(text)


def test_what_lies_where() -> None:
    layout = Plan(world_size=6, num_clients=5, ranks_per_slot=2)
    seen = what_lies_where(layout, hosts_of("a:3,b:3"))
    assert [(host.num_ranks, host.slots, host.clients) for host in seen] == [
        (3, (0, 1), (0, 3, 1, 4)),
        (3, (1, 2), (2,)),
    ]


@pytest.mark.parametrize(
    ("ranks_per_slot", "hosts", "expected"),
    [
        (1, "1x4", (0, 0)),  # nothing leaves the host
        (1, "4x1", (1, 3)),  # each to the next, and to three others
        (1, "2x2", (1, 4)),  # of each host's two ranks one is at the border; each has two peers elsewhere
        (2, "2x2", (2, 2)),  # two rings, a slot on each host
    ],
)
def test_what_crosses_from_host_to_host(ranks_per_slot: int, hosts: str, expected: tuple[int, int]) -> None:
    assert crossings(Plan(4, 4, ranks_per_slot), hosts_of(hosts)) == expected


def test_seconds_are_bytes_over_bandwidth_and_latency_by_hops() -> None:
    layout, hosts = Plan(4, 4, 1), hosts_of("4x1")
    cost = cost_of(layout, hosts, Link(1e6, 0.0))
    for average in cost.averages:
        assert average.crossing == pytest.approx(1.5 * average.handed, rel=1e-3)  # 2 (S − 1) / S
        assert average.seconds == pytest.approx(average.crossing / 1e6)
    far = cost_of(layout, hosts, FAR)
    burst = far.averages[0].crossing / 6  # one tensor, 2 (S − 1) round trips, and those of a connection that has rested
    start = max(0, math.ceil(math.log2(1 + burst / 14600)) - 1)
    assert far.averages[0].seconds == pytest.approx((6 + start) * 0.2, rel=1e-3)
    assert far.seconds["messages"] == pytest.approx(4 * 0.1 * 4)
    assert cost_of(layout, hosts_of("1x4"), FAR).seconds == {"averages": 0.0}


@pytest.mark.parametrize(
    ("num_bytes", "slots", "trips"), [(1000, 2, 2), (4 << 20, 2, 2), (64 << 20, 2, 32), (64 << 20, 4, 48)]
)
def test_far_away_a_large_tensor_waits_for_its_segments(num_bytes: int, slots: int, trips: int) -> None:
    """Two of gloo's segments of 1 MiB are under way, and the next ones wait a round trip."""
    part = _all_reduce(num_bytes, slots)
    assert part.hops == trips
    near, far = Link(1e9, 0.0), Link(1e9, 0.05)
    wire = part.on_ring / 1e9
    assert seconds_of(part, near, 1, 1) == pytest.approx(wire)
    start = max(0, math.ceil(math.log2(1 + part.on_ring / trips / 14600)) - 1)
    assert seconds_of(part, far, 1, 1) == pytest.approx(wire + (trips + start) * 0.1)
    assert seconds_of(part, far, 0, 0) == 0.0


def test_fewer_bits_send_less_and_the_stages_send_what_they_train() -> None:
    layout, hosts = Plan(2, 2, 1), hosts_of("2x1")
    exact = cost_of(layout, hosts)
    assert [average.stage for average in exact.averages] == ["stage1", "stage2"]
    assert exact.averages[0].handed < exact.averages[1].handed
    int8 = cost_of(layout, hosts, aggregate={"precision": "int8"})
    assert 0.25 < int8.bytes_sent_per_rank / exact.bytes_sent_per_rank < 0.28
    once = cost_of(layout, hosts, aggregate={"after_stage1": False})
    assert once.averages == exact.averages[1:]
    assert cost_of(Plan(1, 2, 1), ["a"]).bytes_sent_per_rank == 0
    assert cost_of(layout, hosts, strategy={"name": "local"}).averages == []


def test_a_thousand_ranks_take_seconds() -> None:
    layout, hosts = Plan(world_size=1024, num_clients=300, ranks_per_slot=4), hosts_of("128x8")
    began = time.process_time()
    cost = cost_of(layout, hosts, deepspeed={"zero_optimization": {"stage": 2}}, aggregate={"precision": "int8"})
    assert time.process_time() - began < 10
    assert len(what_lies_where(layout, hosts)) == 128
    assert cost.bytes_sent_per_rank > 0


def test_the_speed_of_a_measured_run(tmp_path: Path) -> None:
    config = config_of()
    lines = [make_line(r, peak_memory_bytes=[1, 1, 1]) for r in range(3)]
    lines[0]["stage_seconds"] = dict.fromkeys(lines[0]["stage_seconds"], 99.0)  # the first round warms up
    run = make_run(tmp_path / "run", config, lines)
    rates = rates_of(run)
    # 3 ranks are 3 slots of a client each: 1 and 2 steps of 4 pairs, in 1 s and 3.5 s; evaluation 1.2 s
    assert rates.pairs_per_s == {"stage1": 4.0, "stage2": pytest.approx(8 / 3.5)}
    layout, hosts = Plan(2, 3, 1), ["a", "b"]
    cost = round_cost(config, model(), layout, hosts, FAST, rates=rates)  # a slot has two clients
    assert (cost.seconds["stage1"], cost.seconds["stage2"]) == (pytest.approx(2.0), pytest.approx(7.0))
    assert (cost.seconds["evaluate"], cost.seconds["checkpoint"]) == (pytest.approx(2.4), 0.2)
    with pytest.raises(ConfigError, match=r"--measured: that run's slots had 1 ranks, and these would have 2"):
        round_cost(config, model(), Plan(2, 3, 2), hosts, FAST, rates=rates)
    with pytest.raises(ConfigError, match=r"--measured: .* is not the folder of a run"):
        rates_of(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump(make_config(tmp_path / "run", make_data(tmp_path / "data"), clients={"timeout_s": 0.5})))
    words = ["doctor", "--plan", "--config", str(path)]
    assert main([*words, "--hosts", "3x2"]) == 0
    told = capsys.readouterr().out
    for part in (
        "6 ranks = 3 slots × 2 ranks, 3 clients",
        "host2",
        "average after stage2: ",
        "a round sends ",
        "3 rounds",
    ):
        assert part in told, told
    assert main([*words, "--hosts", "a:3,b:3", "--link", "0.0001", "--json"]) == 1
    launch = json.loads(capsys.readouterr().out)["launch"]
    assert launch["torn_slots"] == {"1": ["a", "b"]}
    keys = [problem.partition(":")[0] for problem in launch["problems"]]
    assert keys == ["clients.timeout_s", "clients.timeout_s", "topology.ranks_per_slot"]
    for wrong, expected in [
        (["--num-ranks", "5", "--hosts", "3x2"], "--num-ranks: 5, but --hosts has 6"),
        (["--measured", "x"], "--measured: goes with --plan --hosts"),
        (["--hosts", "3x2", "--link", "0"], "--link: must be more than 0"),
    ]:
        assert main([*words, *wrong]) == 2
        assert expected in capsys.readouterr().err


def test_a_dry_run_says_what_memory_a_rank_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump(make_config(tmp_path / "run", make_data(tmp_path / "data"))))
    assert main(["train", "--config", str(path), "--topology.dry_run", "true"]) == 0
    told = capsys.readouterr()
    assert re.search(r" a rank needs \d+\.\d [MG]B at its peak; feddra-ds doctor --plan", told.err), told.err
    assert (
        "1 rank = 1 slot × 1 rank, 3 clients, at most 3 per slot. They met, and each slot added up a number" in told.err
    )
    assert not (tmp_path / "run").exists()
