"""Ranks of one run find each other in a store; others are sent away. Threads stand for ranks, over one store."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from feddra_ds.common.errors import ConfigError, WaitTimeout, is_told
from feddra_ds.distributed import meeting
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.meeting import Place, address_of, meet
from feddra_ds.distributed.plan import plan

COMMON = {"run.output_dir": "here", "optimizer.lr": 0.1}


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`join(rank, **what differs)` starts a rank; .result() is a word that its run's coordinator writes, and the places."""
    store = dist.HashStore()
    monkeypatch.setattr(meeting, "_store", lambda *_: store)
    pool = ThreadPoolExecutor(8)

    def one(rank: int, common: dict[str, Any], timeout_s: float, agent_serves: bool) -> tuple[str, list[Place]]:
        launch = Launch(rank, 3, rank, "head", 29500, agent_serves=agent_serves)
        found, places = meet(launch, f"cuda:{rank}", timeout_s, common)
        if rank == 0:
            found.set("the word", secrets.token_hex(4))
        return found.get("the word").decode(), places

    def start(rank: int, *, timeout_s: float = 20.0, agent_serves: bool = False, **changes: Any) -> Future[Any]:
        return pool.submit(one, rank, COMMON | changes, timeout_s, agent_serves)

    yield start
    pool.shutdown()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_hear_the_same_word_and_who_is_where(join: Any) -> None:
    found = [started.result(20) for started in [join(rank) for rank in (2, 0, 1)]]
    assert len({word for word, _ in found}) == 1
    for _, places in found:
        assert [place.device for place in places] == ["cuda:0", "cuda:1", "cuda:2"]
        assert {place.host for place in places} == {socket.gethostname()}


def test_a_rank_of_another_run_is_sent_away_and_the_own_one_joins(join: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="feddra_ds"):
        first, second = join(0), join(2)
        with pytest.raises(ConfigError) as error:
            join(1, **{"run.output_dir": "there", "optimizer.lr": 0.5}).result(20)
        (line,) = error.value.problems
        assert line.startswith("rank 1 found another run at head:29500 (process ")
        assert "run.output_dir is 'here' there and 'there' here, optimizer.lr is 0.1 there and 0.5 here" in line
        assert "--master_port" in line
        assert not first.done()
        until(lambda: bool(caplog.records))
        assert "came as rank 1 of another run, and was sent away: run.output_dir, optimizer.lr differ" in caplog.text
        own = join(1)
        assert len({started.result(20)[0] for started in (first, second, own)}) == 1


def test_a_place_is_taken_once(join: Any) -> None:
    """The same command twice at one port: its config is the same."""
    earlier = [join(0), join(1)]
    until(lambda: all(started.running() for started in earlier))
    time.sleep(0.2)
    original, meeting.os.getpid = meeting.os.getpid, lambda: 1  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError, match=r"rank 1 of this run has joined already, as process .*started twice"):
            join(1).result(20)
    finally:
        meeting.os.getpid = original  # type: ignore[method-assign]
    join(2).result(20)
    assert len({started.result(20)[0] for started in earlier}) == 1


def test_who_does_not_come_is_named(join: Any) -> None:
    first, second = join(0, timeout_s=0.5), join(1, timeout_s=0.5)
    with pytest.raises(WaitTimeout, match=r"rank 0 waited [01] s for rank 2 of 3 to join at head:29500; .*timeout_s"):
        first.result(20)
    with pytest.raises(WaitTimeout, match=r"rank 1 waited [01] s for the coordinator .* waits for other ranks"):
        second.result(20)


@pytest.mark.parametrize("is_complete", [True, False])
def test_after_a_restart_ranks_wait_for_the_new_word(join: Any, monkeypatch: Any, is_complete: bool) -> None:
    """The agent's store still has the word of the ranks that were killed, and maybe their places."""
    ranks = (0, 1, 2) if is_complete else (0, 1)
    earlier = [join(rank, timeout_s=20.0 if is_complete else 0.3, agent_serves=True) for rank in ranks]
    words = {started.result(20)[0] for started in earlier if is_complete}
    if not is_complete:
        assert all(isinstance(started.exception(20), WaitTimeout) for started in earlier)
    monkeypatch.setattr(meeting.os, "getpid", lambda: threading.get_ident())
    later = [join(rank, agent_serves=True) for rank in (1, 2)]  # before the coordinator
    time.sleep(0.3)
    assert not any(started.done() for started in later)
    now = {started.result(20)[0] for started in [join(0, agent_serves=True), *later]}
    assert len(now) == 1
    assert not now & words


def test_a_store_on_the_loopback_is_not_heard_outside() -> None:
    """One process, and a launch whose address is the loopback: torch's own store listens everywhere."""
    import psutil

    store = meeting._store(Launch(0, 1, 0, "127.0.0.1", 0), timedelta(seconds=5))
    heard = {
        c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == store.port
    }
    assert heard == {"127.0.0.1"}


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"topology\.interface: eht0 is no network interface of .*choose one of .*lo"):
        address_of("eht0")


def test_the_plan_as_a_table() -> None:
    layout = plan(4, 3, 2)
    lines = layout.table(["a", "a", "a", "b"], [f"cuda:{i}" for i in (0, 1, 2, 0)], ["north", "south", "west"])
    assert [line.split() for line in lines[1:]] == [
        ["0", "a", "cuda:0", "0", "0", "north,", "west"],
        ["1", "a", "cuda:1", "0", "1"],
        ["2", "a", "cuda:2", "1", "0", "south"],
        ["3", "b", "cuda:0", "1", "1"],
    ]
    assert lines[0].split("  ")[0] == "rank"
    assert layout.apart(["a", "a", "a", "b"]) == {1: ["a", "b"]}
    assert plan(200, 200).table(["h"] * 200, ["cpu"] * 200, [])[-1] == "and 136 more ranks"


def say_no(rank: int, *problems: str) -> Future[bool]:
    """A rank that cannot start."""
    future: Future[bool] = Future()
    launch = Launch(rank, 3, rank, "head", 29500)
    threading.Thread(target=lambda: future.set_result(meeting.refuse(launch, problems)), daemon=True).start()
    return future


def test_what_keeps_one_rank_from_starting_is_said_by_rank_0_and_ends_all(
    join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is missing on one host: nobody waits for its ranks."""
    with caplog.at_level(logging.WARNING, logger="feddra_ds"):
        first, second, third = join(0), join(1), say_no(2, "data.root: there is no folder d")
        assert third.result(10)
        for started in (first, second):
            error = started.exception(10)
            assert isinstance(error, ConfigError)
            assert is_told(error), "it is said again where it is caught"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"on {socket.gethostname()} (rank 2): data.root: there is no folder d"


def test_where_rank_0_cannot_start_the_others_leave_without_a_word(join: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="feddra_ds"):
        second, third = join(1), say_no(2, "schedule.round: no such key")
        assert say_no(0, "schedule.round: no such key").result(10)
        assert third.result(10)
        assert is_told(second.exception(10))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "here", "there"), [("the version of torch", "2.13.0", "2.12.0"), ("optimizer.lr", 0.1, 0.5)]
)
def test_a_rank_of_this_run_on_a_host_that_differs_ends_it_at_once(
    join: Any, caplog: pytest.LogCaptureFixture, name: str, here: Any, there: Any
) -> None:
    """It writes into the same folder, so it is no other run's; rank 0 would wait for it in vain."""
    with caplog.at_level(logging.WARNING, logger="feddra_ds"):
        first, second, third = join(0, **{name: here}), join(1, **{name: here}), join(2, **{name: there})
        assert all(isinstance(started.exception(10), ConfigError) for started in (first, second, third))
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        f"(rank 2): {name} is {here!r} on {socket.gethostname()} (rank 0) and {there!r} here; give all hosts one"
        in line
    )
