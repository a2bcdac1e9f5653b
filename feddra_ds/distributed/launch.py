"""What the launcher's environment says of this process, and which device it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @staticmethod
    def from_environment() -> Launch:
        """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or a world of one where there is no launcher."""
        env = os.environ
        if "RANK" not in env:
            return Launch(0, 1, 0, "127.0.0.1", 0)  # the store takes a port that is free
        return Launch(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank for run.device; raises ValueError where CUDA is asked for and absent."""
    import torch  # on demand: reading the environment should cost nothing

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
