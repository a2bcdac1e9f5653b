"""Work that the ranks of a launch do by shares, and rank 0 puts together; without slots, engines and clients of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from feddra_ds.common.errors import DataError, WaitTimeout
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.launcher_watch import end_with_launcher
from feddra_ds.distributed.meeting import meet

WAIT_S = 1800.0  # shares are alike, so no rank waits long for another
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All ranks of a launch, as rank `rank` of `size` sees them. group: of all of them, on gloo; None for a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, make: Callable[[], T]) -> list[T] | None:
        """What `make` gives on every rank, by rank, on rank 0; None on the others. All ranks call it.

        Where it raises on one rank, it raises there, and DataError with that rank's number and words on the others. Raises
        WaitTimeout where a rank is gone or takes longer than WAIT_S.
        """
        if self.group is None:
            return [make()]
        mine: T | None = None
        problem: Exception | None = None
        try:
            mine = make()
        except Exception as error:
            problem = error
        told: list[str | None] = [None] * self.size
        parts: list[T] | None = cast("list[T]", [None] * self.size) if self.is_first else None
        try:
            dist.all_gather_object(told, None if problem is None else str(problem), self.group)
            if not any(told):
                dist.gather_object(mine, parts, dst=0, group=self.group)
        except RuntimeError as error:
            if problem is not None:
                raise problem from None
            first = str(error).splitlines()[0]
            raise WaitTimeout(
                f"rank {self.rank} of {self.size} did not hear from all others within {WAIT_S:.0f} s, or one has ended, whose "
                f"own lines say why ({first})"
            ) from None
        if problem is not None:
            raise problem
        if any(told):
            raise DataError([f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None])
        return parts


ALONE = World()


@contextmanager
def launched_world(common: Mapping[str, Any]) -> Iterator[World]:
    """The ranks that deepspeed, torchrun, srun or mpirun has started; ALONE where none has, or one rank.

    common: what all must have in common, JSON values by name. Raises ConfigError and WaitTimeout.
    """
    launch = Launch.from_environment(may_be_alone=True)
    if launch.world_size == 1:
        yield ALONE
        return
    end_with_launcher()
    store, _ = meet(launch, "any", WAIT_S, common)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("shares", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=WAIT_S),
    )
    try:
        yield World(launch.rank, launch.world_size, launch.local_rank, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
