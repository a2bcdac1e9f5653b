"""`feddra-ds doctor`: whether this machine can run a training, and with --config whether this one can start."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from feddra_ds.common.console import next_step
from feddra_ds.common.text import size
from feddra_ds.config.load import load, read_tree
from feddra_ds.doctor.finding import Finding
from feddra_ds.doctor.machine import (
    check_deepspeed,
    check_disk,
    check_gloo,
    check_hardware,
    check_network,
    check_software,
)

if TYPE_CHECKING:  # these import torch and transformers, which --help can do without
    from feddra_ds.doctor.memory.ledger import High
    from feddra_ds.doctor.memory.verdict import Verdict

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}

EXAMPLES = (
    "feddra-ds doctor",
    "feddra-ds doctor --config my.yaml --num-ranks 4",
    "feddra-ds doctor --config my.yaml --plan --gpu 24   # would it fit into 24 GiB?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `doctor`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="check this config too: data, topology, parameters, disk; --section.key value come on top, as in `train`",
    )
    parser.add_argument(
        "--num-ranks", type=int, default=1, metavar="N", help="ranks that will be launched, over all hosts (default: 1)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="bound of each test that is run (default: 120)"
    )
    parser.add_argument("--no-self-test", action="store_true", help="do not import DeepSpeed nor start two gloo ranks")
    parser.add_argument(
        "--plan", action="store_true", help="predict a rank's peak memory instead; needs --config, builds no weights"
    )
    parser.add_argument(
        "--gpu", type=float, metavar="GIB", help="plan for a GPU of so many GiB, whether or not one is here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 1 where there is a problem. Raises ValueError for bad options."""
    if args.num_ranks < 1:
        raise ValueError(f"--num-ranks: must be at least 1, got {args.num_ranks}")
    if args.timeout <= 0:
        raise ValueError(f"--timeout: must be more than 0 seconds, got {args.timeout:g}")
    if args.rest and args.config is None:
        raise ValueError(f"{args.rest[0]}: config keys need --config FILE beside them")
    if args.gpu is not None and (not args.plan or args.gpu <= 0):
        raise ValueError(f"--gpu: is a number of GiB for --plan, got {args.gpu:g}")
    if args.plan and args.config is None:
        raise ValueError("--plan: needs --config FILE")
    if args.config is not None:
        read_tree(args.config)  # a file that is not there is told before minutes of tests
    return _plan(args) if args.plan else _check(args)


def _check(args: argparse.Namespace) -> int:
    """Print findings as they come; 1 where one is a problem."""
    findings: list[Finding] = []
    console = Console(soft_wrap=True)
    for finding in _findings(args):
        findings.append(finding)
        if not args.json:
            console.print(_line(finding))
    problems = sum(f.level == "problem" for f in findings)
    if args.json:
        print(json.dumps({"problems": problems, "findings": [asdict(f) for f in findings]}))
    else:
        warnings = sum(f.level == "warning" for f in findings)
        print(f"{problems} problems, {warnings} warnings")
        next_step(*_advice(args, problems))
    return 1 if problems else 0


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    yield from check_software()
    yield from check_hardware()
    yield from check_network()
    if not args.no_self_test:
        yield from check_deepspeed(args.timeout)
        yield from check_gloo(args.timeout)
    if args.config is None:
        yield from check_disk(Path.cwd(), None)
    else:
        from feddra_ds.doctor.run_config import check_config  # late: torch and transformers

        yield from check_config(args.config, args.overrides, args.num_ranks)


def _plan(args: argparse.Namespace) -> int:
    """Plan and print; 0 where it fits, else 1. Raises ConfigError."""
    from feddra_ds.doctor.memory.verdict import judge, machine_here  # late: torch and transformers

    config = load(args.config, args.overrides)
    verdict = judge(config, args.num_ranks, machine_here(config.run.device, args.num_ranks, args.gpu))
    if args.json:
        print(json.dumps(verdict.as_dict()))
    else:
        show(verdict, Console(soft_wrap=True))
    return 0 if verdict.short is None else 1


def _line(finding: Finding) -> Text:
    line = Text(f"{finding.level:<8}", style=_STYLES[finding.level])
    line.append(f" {finding.what}: ", style="bold")
    line.append(finding.found, style="default")
    if finding.todo:
        line.append(f"\n         → {finding.todo}", style="default")
    return line


def _advice(args: argparse.Namespace, problems: int) -> list[str]:
    again = "feddra-ds doctor" + (f" --config {args.config}" if args.config else "")
    if problems:
        return [f"mend the problems above, then again: {again}"]
    if args.config is None:
        return ["feddra-ds doctor --config FILE   # checks data, topology and parameters of a run"]
    keys = " ".join(args.rest)
    if args.num_ranks > 1:
        launcher = f"deepspeed --num_accelerators {args.num_ranks} --module feddra_ds train"
        return [f"{launcher} --config {args.config} {keys}".rstrip()]
    return [f"feddra-ds train --config {args.config} {keys}".rstrip()]


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
