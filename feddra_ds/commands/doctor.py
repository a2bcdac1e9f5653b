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
from feddra_ds.common.text import duration, listed, size
from feddra_ds.config.load import load, read_tree
from feddra_ds.doctor.finding import Finding
from feddra_ds.doctor.hosts import hosts_of, hosts_of_file
from feddra_ds.doctor.machine import (
    LAUNCHER_PORT,
    check_deepspeed,
    check_disk,
    check_gloo,
    check_hardware,
    check_network,
    check_software,
)

if TYPE_CHECKING:  # these import torch and transformers, which --help can do without
    from feddra_ds.doctor.forecast import Forecast
    from feddra_ds.doctor.memory.ledger import High
    from feddra_ds.doctor.memory.verdict import Verdict

_MOST_HOSTS = 16  # of a table for reading
_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}

EXAMPLES = (
    "feddra-ds doctor",
    "feddra-ds doctor --config my.yaml --num-ranks 4",
    "feddra-ds doctor --config my.yaml --plan --gpu 24   # would it fit into 24 GiB?",
    "feddra-ds doctor --config my.yaml --plan --hosts 2x4 --link 10   # who lies where, and what a round costs",
    "feddra-ds doctor --config my.yaml --hostfile hosts   # can these hosts start it? by ssh, and how fast is the way",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `doctor`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="check this config too: data, topology, parameters, disk; --section.key value come on top, as in `train`",
    )
    parser.add_argument(
        "--num-ranks", type=int, metavar="N", help="ranks that will be launched, over all hosts (default: 1)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="bound of each test that is run (default: 120)"
    )
    parser.add_argument(
        "--hostfile",
        metavar="FILE",
        help="look at each of its hosts over ssh, as a launch from here would meet them: versions, config, data, ports, "
        "interfaces, clocks, disk, and the speed of the way to the first one",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=LAUNCHER_PORT,
        metavar="PORT",
        help=f"with --hostfile: where rank 0 would listen (default: {LAUNCHER_PORT})",
    )
    parser.add_argument("--no-self-test", action="store_true", help="do not import DeepSpeed nor start two gloo ranks")
    parser.add_argument(
        "--plan", action="store_true", help="predict a rank's peak memory instead; needs --config, builds no weights"
    )
    parser.add_argument(
        "--gpu", type=float, metavar="GIB", help="plan for a GPU of so many GiB, whether or not one is here"
    )
    parser.add_argument(
        "--hosts",
        metavar="HOSTS",
        help="with --plan: what lies on which host, and what a round costs; a hostfile, NAME:RANKS,…, or HOSTSxRANKS as 16x8",
    )
    parser.add_argument(
        "--link", type=float, default=10.0, metavar="GBIT", help="gigabits a second that a host sends (default: 10)"
    )
    parser.add_argument(
        "--latency", type=float, default=0.1, metavar="MS", help="milliseconds from host to host (default: 0.1)"
    )
    parser.add_argument(
        "--measured",
        metavar="RUN",
        help="a short run of this config on slots of as many ranks, whose speed the seconds of a round are taken from",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 1 where there is a problem. Raises ValueError for bad options."""
    hosts = _hosts(args)
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
    return _plan(args, hosts) if args.plan else _check(args, hosts)


def _hosts(args: argparse.Namespace) -> list[str]:
    """The host of each rank, empty without --hosts; --num-ranks becomes their number. Raises ValueError."""
    if args.hostfile is not None:
        if args.plan or args.hosts is not None:
            raise ValueError("--hostfile: looks at hosts that are there; --plan takes the file as --hosts FILE")
        hosts = hosts_of_file(args.hostfile)
        args.num_ranks = len(hosts)
        return hosts
    if args.hosts is None:
        if args.measured is not None:
            raise ValueError("--measured: goes with --plan --hosts HOSTS")
        args.num_ranks = 1 if args.num_ranks is None else args.num_ranks
        return []
    if not args.plan:
        raise ValueError("--hosts: goes with --plan")
    if args.link <= 0:
        raise ValueError(f"--link: must be more than 0 Gbit/s, got {args.link:g}")
    if args.latency < 0:
        raise ValueError(f"--latency: must be 0 ms or more, got {args.latency:g}")
    hosts = hosts_of(args.hosts)
    if args.num_ranks not in (None, len(hosts)):
        raise ValueError(f"--num-ranks: {args.num_ranks}, but --hosts has {len(hosts)}; leave one of them out")
    args.num_ranks = len(hosts)
    return hosts


def _check(args: argparse.Namespace, hosts: list[str]) -> int:
    """Print findings as they come; 1 where one is a problem."""
    findings: list[Finding] = []
    console = Console(soft_wrap=True)
    for finding in _findings(args, hosts):
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


def _findings(args: argparse.Namespace, hosts: list[str]) -> Iterator[Finding]:
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
    if hosts:
        from feddra_ds.doctor.launch import check_hosts

        yield from check_hosts(hosts, args.config, args.overrides, args.port)


def _plan(args: argparse.Namespace, hosts: list[str]) -> int:
    """Plan and print; 0 where it fits, else 1. Raises ConfigError."""
    from feddra_ds.doctor.memory.verdict import judge, machine_here  # late: torch and transformers

    config = load(args.config, args.overrides)
    ranks_here = max((hosts.count(host) for host in set(hosts)), default=args.num_ranks)
    verdict = judge(config, args.num_ranks, machine_here(config.run.device, ranks_here, args.gpu))
    seen = None
    if hosts:
        from feddra_ds.doctor.cost import Link
        from feddra_ds.doctor.forecast import forecast

        link = Link(args.link * 1e9 / 8, args.latency / 1e3)
        seen = forecast(config, verdict, hosts, link, None if args.measured is None else Path(args.measured))
    if args.json:
        print(json.dumps(verdict.as_dict() | ({} if seen is None else {"launch": seen.as_dict()})))
    else:
        console = Console(soft_wrap=True)
        show(verdict, console)
        if seen is not None:
            show_launch(seen, verdict, console)
    return 0 if verdict.short is None and not (seen and seen.problems) else 1


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


def show_launch(seen: Forecast, verdict: Verdict, console: Console) -> None:
    """Who is where, with the memory of each host's ranks; what a round sends and how long it takes."""
    table = Table(title=verdict.layout.describe(), title_justify="left")
    for name in ("host", "ranks", "slots", "clients", "memory of all its ranks"):
        table.add_column(name, justify="left" if name in ("host", "slots", "clients") else "right")
    for host in seen.hosts[:_MOST_HOSTS]:
        clients = listed([verdict.client_ids[index] for index in host.clients]) if verdict.client_ids else ""
        memory = size(host.num_ranks * verdict.plan.bytes_of("host"))
        table.add_row(host.name, str(host.num_ranks), listed([str(slot) for slot in host.slots]), clients, memory)
    console.print(table)
    if len(seen.hosts) > _MOST_HOSTS:
        console.print(f"and {len(seen.hosts) - _MOST_HOSTS} more hosts")
    cost, rounds = seen.cost, seen.num_rounds
    for average in cost.averages:
        console.print(
            f"average after {average.stage}: {size(average.handed)} of a rank, {size(average.crossing)} sent by the busiest "
            f"host, {duration(average.seconds)}"
        )
    console.print(
        f"a round sends {size(cost.bytes_sent_per_rank)} a rank; {rounds} rounds {size(rounds * cost.bytes_sent_per_rank)}"
    )
    total = sum(cost.seconds.values())
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in cost.seconds.items())
    console.print(f"a round takes {duration(total)} ({parts}); {rounds} rounds {duration(rounds * total)}")
    if "evaluate" not in cost.seconds:
        console.print("  without the training itself: --measured RUN takes its speed from a short run")
    for problem in seen.problems:
        console.print(f"[bold red]problem[/bold red] {problem}")


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
