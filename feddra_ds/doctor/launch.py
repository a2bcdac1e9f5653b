"""Whether the hosts of a hostfile can start a training, and whether what connects them is fast enough for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from feddra_ds import strategies
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.common.text import duration
from feddra_ds.config.load import load
from feddra_ds.config.schema import Config
from feddra_ds.distributed.launch import Launch
from feddra_ds.doctor.cost import Link, round_cost
from feddra_ds.doctor.finding import Finding
from feddra_ds.doctor.forecast import launch_problems
from feddra_ds.doctor.memory.verdict import meta_model
from feddra_ds.doctor.remote import Seen, findings, look_at, measure, ways_found
from feddra_ds.run.checks import check


def check_hosts(
    hosts: Sequence[str], config_path: str | None, overrides: dict[str, Any], port: int
) -> Iterator[Finding]:
    """Findings over ssh. hosts: of each rank. What is wrong with the config itself is not said again."""
    try:
        config = None if config_path is None else load(config_path, overrides)
    except ConfigError:
        config = None
    names = list(dict.fromkeys(hosts))
    seen = look_at(names, config_path, config, port)
    yield from findings(seen, config, port)
    if len(names) == 1:
        yield Finding("note", names[0], "is the only host of the file", "nothing, if one host was meant")
    if len(names) == 1 or any(one.problem for one in seen.values()) or not seen[names[0]].answer["is_port_free"]:
        return
    ways = measure(names, _address(names[0], seen[names[0]], config), port)
    yield from ways_found(ways, names[0])
    if config is not None and not any(way.problem for way in ways.values()):
        speed, trip = min(way.bytes_per_s for way in ways.values()), max(way.round_trip_s for way in ways.values())
        yield from _costs(config, hosts, Link(speed, trip / 2))


def _address(first: str, seen: Seen, config: Config | None) -> str:
    """Where the others will look for rank 0."""
    wanted = None if config is None else config.topology.interface
    return str(seen.answer["interfaces"].get(wanted, first))


def _costs(config: Config, hosts: Sequence[str], link: Link) -> Iterator[Finding]:
    """Whether the averages of a round go over that link in time."""
    try:
        _, ids, layout = check(config, Launch(0, len(hosts), 0, "127.0.0.1", 0))
        factor = strategies.build(config.strategy, config.dro).step_factor(len(ids))
        device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
        cost = round_cost(config, meta_model(config), layout, hosts, link, step_factor=factor, device=device)
    except (ConfigError, DataError):  # said by the check of the config
        return
    problems = launch_problems(config, layout, hosts, cost)
    for line in problems:
        key, _, rest = line.partition(": ")
        found, _, todo = rest.partition("; ")
        yield Finding("problem", key, found, todo)
    if not problems:
        yield Finding("ok", "averages", f"{duration(cost.seconds['averages'])} of a round on these links")
