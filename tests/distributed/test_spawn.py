"""The spawn helper itself: results by rank, reuse, and that one rank's failure is everybody's, with its name."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from spawn import RankError, RankPool, run_ranks


def _sum(rank: int, world_size: int, offset: float) -> tuple[int, torch.Tensor]:
    x = torch.tensor([rank + offset])
    dist.all_reduce(x)
    return os.getpid(), x


def _raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one had enough")
    dist.barrier()


def _die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _sleep_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def _own_group(rank: int, world_size: int) -> int:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")  # from the environment
    x = torch.ones(())
    dist.all_reduce(x)
    return int(x)


def test_results_come_by_rank_and_the_ranks_are_reused() -> None:
    first = run_ranks(_sum, 2, 0.5)
    second = run_ranks(_sum, 2, 0.0)
    assert [x.item() for _, x in first] == [2.0, 2.0]
    assert [x.item() for _, x in second] == [1.0, 1.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert first[0][0] != first[1][0]


@pytest.mark.parametrize(
    ("fn", "message"),
    [(_raise_on_one, "rank one had enough"), (_die_on_one, "exit code -9"), (_sleep_on_one, "did not finish")],
)
def test_a_failing_rank_fails_the_case_by_name_and_the_next_case_runs(fn, message: str) -> None:
    run_ranks(_sum, 2, 0.0)  # the pool is up: the bound below is the case's, not the launch's
    start = time.monotonic()
    with pytest.raises(RankError, match=message) as error:
        run_ranks(fn, 2, timeout=5)
    assert error.value.rank == 1
    assert time.monotonic() - start < 20
    assert [x.item() for _, x in run_ranks(_sum, 2, 0.0)] == [1.0, 1.0]


def test_a_function_may_make_its_own_default_group() -> None:
    assert run_ranks(_own_group, 2, init_group=False) == [2, 2]


def test_a_case_that_is_interrupted_leaves_no_answers_for_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with RankPool(2, init_group=False) as pool:
            with pytest.raises(KeyboardInterrupt):
                pool.run(_sleep_on_one, timeout=50)
            assert not pool.alive
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
