"""Importing deepspeed without its side effects on other slots, and its monitor."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def build_monitor(kinds: Sequence[str], output_dir: str, name: str) -> Any:
    """DeepSpeed's MonitorMaster writing scalars under output_dir; for the coordinator only (it writes once per world)."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    keys = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
    where: dict[str, Any] = {"enabled": True, "output_path": output_dir, "job_name": name}
    ds_config = {keys[k]: {"enabled": True, "project": name} if k == "wandb" else where for k in kinds}
    return MonitorMaster(get_monitor_config(ds_config))


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed package, set up for `device` (with its process group, where none is there yet)."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists on it, whatever the launcher
    import deepspeed

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
    place = {"RANK": str(slot_rank), "WORLD_SIZE": str(ranks_per_slot)}
    before = {key: os.environ.get(key) for key in place}
    os.environ.update(place)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
