"""Importing deepspeed without its side effects on other slots, and leaving no trace of it after a run."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from feddra_ds.common.environment import environment
from feddra_ds.common.errors import ConfigError


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed package, set up for `device` (with its process group, where none is there yet).

    Raises ConfigError where DeepSpeed already serves another kind of device: it takes one for the life of a process.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists on it, whatever the launcher
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    serves = get_accelerator().device_name()
    if serves != device.type:
        raise ConfigError(
            [
                f"run.device: the run takes {device.type}, but DeepSpeed serves {serves} in this process (DS_ACCELERATOR, "
                "or what ran here before); start another process"
            ]
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of collectives it calls
    # DeepSpeed's shared-memory all-reduce for CPUs names its segments by port and rank: two slots on a host would
    # write into each other's. gloo is used instead, which also spares a first run the C++ build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


@contextmanager
def launched_as(slot_rank: int, ranks_per_slot: int) -> Iterator[None]:
    """Show DeepSpeed the slot as the launch: zero.Init refuses a group of one rank where WORLD_SIZE says more."""
    with environment({"RANK": str(slot_rank), "WORLD_SIZE": str(ranks_per_slot)}):
        yield


_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def close_when_leaving(engine: Any) -> None:
    """Have leave_groups take a DeepSpeed engine's hooks off its parameters, without which its memory is never freed."""
    _engines.add(engine)


def leave_groups(*, failed: bool = False) -> None:
    """Forget the process groups and what DeepSpeed keeps of a run, so that the process can start another.

    Call it however a run ended, once nothing refers to its engine any more; the ranks need not call it together.
    failed: the other ranks may be gone, so what waits for them on the device is aborted.
    """
    if failed and dist.is_initialized():
        if dist.get_backend() == "nccl":
            for group in list(dist.distributed_c10d._world.pg_map):
                group.abort()
        _close_engines()
    if "deepspeed" in sys.modules:
        _reset_deepspeed()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # engines and data loaders are full of circles; their memory, threads and sockets end here
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _close_engines() -> None:
    for engine in list(_engines):
        with contextlib.suppress(Exception):  # it may be half built; why the run failed matters more
            engine.destroy()


def _reset_deepspeed() -> None:
    """Give DeepSpeed's global state the values that it has after import."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator
    from deepspeed.utils import groups

    comm.cdb = None
    groups._release_process_group_references()
    # ZeRO 3 numbers modules and parameters through the life of a process and compares the numbers over ranks, which
    # may have run different things before; a forward pass that was interrupted leaves its modules on the stack.
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.Init.param_id = 0
    # a cache that never forgets: it would keep every model that was trained with ZeRO 3
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = inspect.getclosurevars(coordinator._PartitionedParameterCoordinator__params_to_release)
    cached.nonlocals["func"].cache_clear()
    replaced = partition_parameters.InsertPostInitMethodToModuleSubClasses
    if hasattr(replaced, "linear_bk"):  # zero.Init puts its own in place for good
        torch.nn.functional.linear = replaced.linear_bk
