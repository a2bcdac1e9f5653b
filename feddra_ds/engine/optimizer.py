"""The local optimizer: parameter groups by part, and what makes a stage cheap and its start fresh."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from feddra_ds.common.tree import get_path
from feddra_ds.config.schema import Config
from feddra_ds.engine.build_locks import stale_locks
from feddra_ds.engine.muon import MuonAndAdamW
from feddra_ds.engine.parts import PARTS


def pass_over_frozen_groups(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make the optimizer's step leave out groups whose learning rate is 0, instead of reading and writing all of them.

    Every ZeRO stage and precision ends in this inner `step`, so stage 1 pays for the aligner's masters alone.
    """
    whole_step = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["lr"] != 0]
        try:
            return whole_step(*args, **kwargs) if optimizer.param_groups else None
        finally:
            optimizer.param_groups = groups

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def skip_bad_steps(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's step change nothing where a gradient is not finite, and say so in `overflow`.

    DeepSpeed reads that name off its own optimizers, which do the same. The gradients are reduced by then, so that all
    ranks decide alike.
    """
    step_taken = optimizer.step

    @torch.no_grad()
    def step(*args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        optimizer.overflow = not bool(norms.isfinite().all())  # type: ignore[attr-defined]
        return None if optimizer.overflow else step_taken(*args, **kwargs)  # type: ignore[attr-defined]

    optimizer.step = step  # type: ignore[method-assign]


def reset_state(engine: Any) -> None:
    """Make the optimizer as new: every state tensor and step count to zero, in place (DeepSpeed linked them once)."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                state[key] = 0


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_all: bool = False, matrices: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Optimizer groups: each part, split into what decays and what does not (biases, norms, the temperature).

    matrices: names of the parameters that Muon trains, which have groups of their own.
    """
    decays = {n for n, _ in model.named_parameters()} if decay_all else set(model.decay_parameter_names())  # type: ignore[operator]
    groups = []
    for part in PARTS:
        named = [(n, p) for n, p in model.named_parameters() if n.startswith(f"{part}.") and p.requires_grad]
        kinds = itertools.product(
            (True, False) if weight_decay > 0 else (None,), (True, False) if matrices else (False,)
        )
        for decay, is_muon in kinds:
            parameters = [
                p for n, p in named if (decay is None or (n in decays) == decay) and (n in matrices) == is_muon
            ]
            if parameters:
                decay_by = weight_decay if decay else 0.0
                groups.append({"params": parameters, "part": part, "weight_decay": decay_by, "is_muon": is_muon})
    return groups


def build_optimizer(groups: list[dict[str, Any]], config: Config, ds_config: dict[str, Any]) -> torch.optim.Optimizer:
    """The local optimizer over parameter groups; DeepSpeed's CPUAdam where the optimizer is offloaded."""
    options = config.optimizer
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    if options.name == "muon":
        return MuonAndAdamW(groups, lr=options.lr, momentum=options.muon_momentum, betas=options.betas, eps=options.eps)
    if get_path(ds_config, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if locks := stale_locks():
            raise RuntimeError(
                f"{locks[0]} was left by a build that was killed, and building DeepSpeed's CPU Adam would wait for it for "
                "ever; remove it"
            )

        return DeepSpeedCPUAdam(groups, lr=options.lr, betas=options.betas, eps=options.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def bucket_elements(ds_config: Mapping[str, Any], num_trained: int) -> int:
    """Elements of ZeRO's flat gradient buffer: DeepSpeed reserves 5e8 whatever the model; never more than it can fill."""
    asked = get_path(dict(ds_config), "zero_optimization.reduce_bucket_size")
    return min(num_trained, int(float(5e8 if asked is None else asked)))
