"""`feddra-ds doctor --plan`: a rank's peak memory by purpose, whether it fits, and which keys to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from . import build
from .config import Config, ConfigError, from_dict, get_path, load, set_path
from .memory import MemoryPlan, plan_memory
from .memory.ledger import High
from .report_contents import size
from .topology import Launch
from .weights.deferred import defer

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
    ranks_per_slot: int
    clients_per_slot: int
    short: str | None
    changes: list[Change]


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
    _, _, layout = build.check(checked, Launch(0, num_ranks, 0, "127.0.0.1", 0))
    clients = max(len(layout.clients_of(slot)) for slot in range(layout.num_slots))
    ranks = layout.ranks_per_slot
    plan = _plan(config, ranks, clients, machine)
    short = _short(plan, machine)
    changes: list[Change] = []
    if short is not None:
        peak = plan.bytes_of(short)
        for key, value in candidates(config, ranks, machine):
            more_ranks = int(value) if key == "topology.ranks_per_slot" else ranks
            try:
                other = _plan(_changed(config, key, value), more_ranks, clients, machine)
            except ConfigError:
                continue
            saved = peak - other.bytes_of(short)
            if saved > _LEAST * peak:
                changes.append(Change(key, value, saved, _short(other, machine) is None))
    changes.sort(key=lambda change: -change.saves)
    return Verdict(plan, machine, ranks, clients, short, changes)


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


def _plan(config: Config, ranks: int, clients: int, machine: Machine) -> MemoryPlan:
    tokenizer = build.tokenizer_of(config)
    model, _ = defer(lambda: build.model_of(config, tokenizer))
    device = "cpu" if machine.device is None else "cuda"
    return plan_memory(config, model.to("meta"), ranks_per_slot=ranks, clients_per_slot=clients, device=device)


def _changed(config: Config, key: str, value: Any) -> Config:
    tree = config.model_dump()
    set_path(tree, key, value)
    return from_dict(tree)


def _short(plan: MemoryPlan, machine: Machine) -> str | None:
    if machine.device is not None and plan.bytes_of("device") > machine.device:
        return "device"
    return "host" if plan.bytes_of("host") * machine.ranks_here > machine.host else None


def run_plan(path: str, overrides: dict[str, Any], num_ranks: int, gpu_gib: float | None, as_json: bool) -> int:
    """Plan, print; 0 where it fits, else 1. Raises ConfigError."""
    config = load(path, overrides)
    verdict = judge(config, num_ranks, machine_here(config.run.device, num_ranks, gpu_gib))
    if as_json:
        import json

        print(json.dumps(as_dict(verdict)))
    else:
        show(verdict, Console(soft_wrap=True))
    return 0 if verdict.short is None else 1


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """The verdict as plain data; bytes."""
    plan = verdict.plan
    return {
        "fits": verdict.short is None,
        "short": verdict.short,
        "ranks_per_slot": verdict.ranks_per_slot,
        "clients_per_slot": verdict.clients_per_slot,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "machine": asdict(verdict.machine),
        "peak": {where: plan.bytes_of(where) for where in ("device", "host")},
        "phases": {
            where: {name: high.total for name, high in getattr(plan, where).items()} for where in ("device", "host")
        },
        "items": {where: high.items for where in ("device", "host") if (high := plan.peak(where)) is not None},
        "changes": [asdict(change) for change in verdict.changes],
    }


def show(verdict: Verdict, console: Console) -> None:
    """Tables of the peaks, biggest first, then the verdict."""
    plan, machine = verdict.plan, verdict.machine
    total = sum(plan.parameters.values())
    ranks, clients = verdict.ranks_per_slot, verdict.clients_per_slot
    console.print(
        f"{total:,} parameters, {plan.trained:,} trained; on a slot {ranks} rank{'s' * (ranks != 1)} and "
        f"{clients} client{'s' * (clients != 1)}"
    )
    for where in ("device", "host"):
        high = plan.peak(where)
        if high is not None:
            console.print(_table("memory" if plan.one_memory else where, high, total))
    if machine.device is not None:
        console.print(f"a GPU has {size(machine.device)}")
    sharing = "" if machine.ranks_here == 1 else f", for {machine.ranks_here} ranks on this host"
    console.print(f"free here: {size(machine.host)}{sharing}")
    if verdict.short is None:
        console.print("[green]fits[/green]")
        return
    console.print(f"[bold red]does not fit[/bold red]: {verdict.short}. What would help, each alone:")
    for change in verdict.changes:
        console.print(f"  {change.option()}   saves {size(change.saves)}" + (" and fits" if change.fits else ""))


def _table(title: str, high: High, parameters: int) -> Table:
    table = Table(title=f"{title} of a rank at its peak, in {high.phase}", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("per parameter", justify="right")
    for name, amount in high.items.items():
        table.add_row(name, size(amount), f"{amount / parameters:.2f}")
    table.add_section()
    table.add_row("sum", size(high.total), f"{high.total / parameters:.2f}")
    return table
