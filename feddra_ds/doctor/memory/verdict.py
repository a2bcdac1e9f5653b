"""A memory plan beside a machine: whether it fits, and which keys of the config to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from feddra_ds import strategies
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.tree import get_path, set_path
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.plan import Plan
from feddra_ds.doctor.memory.plan import MemoryPlan, plan_memory
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.weights.deferred import defer
from feddra_ds.run.checks import check

_LEAST = 0.01  # of the peak that a change must save to be told


@dataclass(frozen=True)
class Machine:
    """What there is: bytes free on this host, ranks that will share them, bytes of a GPU (None without one)."""

    host: int
    ranks_here: int
    device: int | None


@dataclass(frozen=True)
class Change:
    """A config key that would save `saves` bytes of a rank's peak where it is short; fits: that change alone is enough."""

    key: str
    value: Any
    saves: int
    fits: bool

    def option(self) -> str:
        """As an argument of the command line."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"--{self.key} '{value}'" if isinstance(value, dict) else f"--{self.key} {value}"


@dataclass(frozen=True)
class Verdict:
    """A plan beside a machine. short: where it does not fit, `host` or `device`, or None; changes: the largest first."""

    plan: MemoryPlan
    machine: Machine
    layout: Plan
    client_ids: list[str]
    step_factor: int
    short: str | None
    changes: list[Change]

    @property
    def ranks_per_slot(self) -> int:
        return self.layout.ranks_per_slot

    @property
    def clients_per_slot(self) -> int:
        """Of the slot that hosts most."""
        return len(self.layout.clients_of(0))

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready data; bytes."""
        plan = self.plan
        return {
            "fits": self.short is None,
            "short": self.short,
            "ranks_per_slot": self.ranks_per_slot,
            "clients_per_slot": self.clients_per_slot,
            "parameters": plan.parameters,
            "trained": plan.trained,
            "machine": asdict(self.machine),
            "peak": {where: plan.bytes_of(where) for where in ("device", "host")},
            "phases": {
                where: {name: high.total for name, high in getattr(plan, where).items()} for where in ("device", "host")
            },
            "items": {where: high.items for where in ("device", "host") if (high := plan.peak(where)) is not None},
            "changes": [asdict(change) for change in self.changes],
        }


def machine_here(device: str, num_ranks: int, gpu_gib: float | None) -> Machine:
    """This host and its GPU where run.device lets it be used, or a GPU of so many GiB that may not be there."""
    free = psutil.virtual_memory().available
    if gpu_gib is not None:
        return Machine(free, 1, int(gpu_gib * 2**30))
    if device != "cpu" and torch.cuda.is_available():
        here = min(num_ranks, torch.cuda.device_count())
        return Machine(free, here, torch.cuda.get_device_properties(0).total_memory)
    return Machine(free, num_ranks, None)


def judge(config: Config, num_ranks: int, machine: Machine) -> Verdict:
    """Plan a config at so many ranks. Raises ConfigError where it cannot run, as training would."""
    checked = config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})
    _, ids, layout = check(checked, Launch(0, num_ranks, 0, "127.0.0.1", 0))
    clients, ranks = len(layout.clients_of(0)), layout.ranks_per_slot
    factor = strategies.build(config.strategy, config.dro).step_factor(len(ids))
    plan = _plan(config, ranks, clients, factor, machine)
    short = _short(plan, machine)
    changes: list[Change] = []
    if short is not None:
        peak = plan.bytes_of(short)
        for key, value in candidates(config, ranks, machine):
            more_ranks = int(value) if key == "topology.ranks_per_slot" else ranks
            try:
                other = _plan(_changed(config, key, value), more_ranks, clients, factor, machine)
            except ConfigError:
                continue
            saved = peak - other.bytes_of(short)
            if saved > _LEAST * peak:
                changes.append(Change(key, value, saved, _short(other, machine) is None))
    changes.sort(key=lambda change: -change.saves)
    known = ids if layout.num_clients == len(ids) else []  # none of a strategy that pools them
    return Verdict(plan, machine, layout, known, factor, short, changes)


def plan_of(config: Config, layout: Plan, device: str) -> MemoryPlan:
    """What the ranks of a plan will need on cpu or cuda. Raises ConfigError."""
    factor = strategies.build(config.strategy, config.dro).step_factor(layout.num_clients)
    return plan_memory(
        config,
        meta_model(config),
        ranks_per_slot=layout.ranks_per_slot,
        clients_per_slot=len(layout.clients_of(0)),
        step_factor=factor,
        device=device,
    )


def candidates(config: Config, ranks: int, machine: Machine) -> Iterator[tuple[str, Any]]:
    """Changes of one key each that take less memory, whatever they cost otherwise."""
    zero = "deepspeed.zero_optimization"
    tree = config.model_dump()
    stage = int(get_path(tree, f"{zero}.stage") or 0)
    rows = min(config.data.micro_batch_size or config.data.batch_size, max(1, config.data.batch_size // ranks))
    if rows > 1:
        yield "data.micro_batch_size", max(1, rows // 8)
    if not get_path(tree, "deepspeed.bf16.enabled") and not get_path(tree, "deepspeed.fp16.enabled"):
        yield "deepspeed.bf16.enabled", True
    for higher in (2, 3):
        if stage < higher and ranks > 1:
            yield f"{zero}.stage", higher
    if not config.model.activation_checkpointing:
        yield "model.activation_checkpointing", True
    if config.model.adapter is None:
        yield "model.adapter", {"type": "lora", "r": 8}
    if machine.device is not None and stage >= 1 and not get_path(tree, f"{zero}.offload_optimizer"):
        yield f"{zero}.offload_optimizer", {"device": "cpu"}
    if machine.device is not None and stage == 3 and not get_path(tree, f"{zero}.offload_param"):
        yield f"{zero}.offload_param", {"device": "cpu"}
    if stage >= 1:
        yield f"{zero}.reduce_bucket_size", 20_000_000
        yield "topology.ranks_per_slot", 2 * ranks
    if config.objective.anchors == "resident":
        yield "objective.anchors", "replay"
    if config.evaluation.batch_size > 8:
        yield "evaluation.batch_size", 8
    if config.data.replay_cache_bytes > 0:
        yield "data.replay_cache_bytes", 0


def meta_model(config: Config) -> DualEncoder:
    """The model of a config on the meta device. Raises ConfigError."""
    tokenizer = tokenizer_of(config)
    model, _ = defer(lambda: model_of(config, tokenizer))
    return model.to("meta")


def _plan(config: Config, ranks: int, clients: int, step_factor: int, machine: Machine) -> MemoryPlan:
    device = "cpu" if machine.device is None else "cuda"
    return plan_memory(
        config,
        meta_model(config),
        ranks_per_slot=ranks,
        clients_per_slot=clients,
        step_factor=step_factor,
        device=device,
    )


def _changed(config: Config, key: str, value: Any) -> Config:
    tree = config.model_dump()
    set_path(tree, key, value)
    return from_dict(tree)


def _short(plan: MemoryPlan, machine: Machine) -> str | None:
    if machine.device is not None and plan.bytes_of("device") > machine.device:
        return "device"
    return "host" if plan.bytes_of("host") * machine.ranks_here > machine.host else None
