"""Fitting a classifier through accelerate, on one process or several: the same steps and, up to rounding, the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from feddra_ds.distributed.launch import Launch, choose_device

PATIENCE = timedelta(minutes=10)  # the longest wait of a process for the others
MAX_NORM = 1.0  # of a step's gradient
_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@contextmanager
def accelerated(device: str, mixed_precision: str | None) -> Iterator[Accelerator]:
    """An Accelerator over the processes that the launcher started; what it set up in this process ends with it.

    device: auto, cpu or cuda. mixed_precision: no, bf16 or fp16; None: what `accelerate launch` or its config says.
    Raises ValueError where the launcher, the device or the precision does not fit, ConfigError for a broken environment.
    """
    launch = Launch.from_environment()
    where = choose_device(device, launch.local_rank)
    if mixed_precision == "fp16" and where.type == "cpu":
        raise ValueError("--mixed-precision: fp16 needs a GPU; give bf16")
    own_group, own_state = not dist.is_initialized(), not AcceleratorState._shared_state
    handlers = [InitProcessGroupKwargs(timeout=PATIENCE), DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = Accelerator(cpu=where.type == "cpu", mixed_precision=mixed_precision, kwargs_handlers=handlers)
    try:
        if accelerator.distributed_type not in _KINDS:
            kind = accelerator.distributed_type.value
            raise ValueError(
                f"finetune: accelerate's {kind} is not supported; start it with `accelerate launch --multi_gpu`"
            )
        if accelerator.num_processes != launch.world_size:
            raise ValueError(
                f"finetune: the launcher started {launch.world_size} processes, of which accelerate sees "
                f"{accelerator.num_processes}; start it with `accelerate launch --multi_gpu --num_processes N`"
            )
        yield accelerator
    finally:
        if own_group:
            accelerator.end_training()  # the process group, where there is one
        if own_state:
            AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Schedule:
    """How a classifier is fitted: AdamW at a constant rate, looked at on the val pairs every `steps` steps, at most `checks`
    times, until it has been no better for `patience` of them."""

    lr: float
    weight_decay: float
    steps: int
    checks: int
    patience: int


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    val_loss: Callable[[nn.Module], float],
    schedule: Schedule,
    seed: int,
) -> int:
    """Train `model` in place; it ends as it was when the val loss was least, after so many steps. Collective.

    batches: (inputs, targets) of this process's part of each batch, without end. loss: of such a part, of which the processes'
    mean is the batch's. val_loss: of the model itself, on all val pairs. seed: of dropout. The accelerator keeps model and
    optimizer until its free_memory.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay)
    # `model` is what is wrapped, and is asked itself: accelerate's unwrap_model imports DeepSpeed
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    def look() -> float:
        value = torch.tensor(val_loss(model), device=accelerator.device)
        return float(accelerator.reduce(value, "mean"))  # all decide by one number

    best, best_check, kept = look(), 0, copy.deepcopy(model.state_dict())
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(seed * accelerator.num_processes + accelerator.process_index)
        for check in range(1, schedule.checks + 1):
            wrapped.train()
            for inputs, targets in islice(batches, schedule.steps):
                accelerator.backward(loss(wrapped(inputs), targets))
                accelerator.clip_grad_norm_(trained, MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
            found = look()
            if found < best:
                best, best_check, kept = found, check, copy.deepcopy(model.state_dict())
            elif check - best_check >= schedule.patience:
                break
    model.load_state_dict(kept)
    return best_check * schedule.steps
