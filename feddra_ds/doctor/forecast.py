"""A launch over hosts, before it: what lies where, how much memory each host needs, and what a round costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feddra_ds.common.text import duration, listed
from feddra_ds.config.schema import Config
from feddra_ds.distributed.plan import Plan
from feddra_ds.doctor.cost import Link, RoundCost, rates_of, round_cost
from feddra_ds.doctor.hosts import Host, what_lies_where
from feddra_ds.doctor.memory.verdict import Verdict, meta_model


@dataclass(frozen=True)
class Forecast:
    """cost: of a round. problems: lines with what would not work. torn: slots that lie on several hosts, with these."""

    hosts: list[Host]
    cost: RoundCost
    num_rounds: int
    torn: dict[int, list[str]]
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready data; bytes and seconds."""
        return {
            "hosts": [asdict(host) for host in self.hosts],
            "bytes_sent_per_rank": self.cost.bytes_sent_per_rank,
            "averages": [asdict(average) for average in self.cost.averages],
            "seconds": self.cost.seconds,
            "rounds": self.num_rounds,
            "torn_slots": self.torn,
            "problems": self.problems,
        }


def forecast(config: Config, verdict: Verdict, hosts: list[str], link: Link, measured: Path | None) -> Forecast:
    """hosts: of each rank. measured: the folder of a run to take speeds from. Raises ConfigError."""
    layout = verdict.layout
    cost = round_cost(
        config,
        meta_model(config),
        layout,
        hosts,
        link,
        rates=None if measured is None else rates_of(measured),
        step_factor=verdict.step_factor,
        device="cpu" if verdict.machine.device is None else "cuda",
    )
    problems = launch_problems(config, layout, hosts, cost)
    return Forecast(what_lies_where(layout, hosts), cost, config.schedule.rounds, layout.apart(hosts), problems)


def launch_problems(config: Config, layout: Plan, hosts: Sequence[str], cost: RoundCost) -> list[str]:
    """What would not work on these hosts (a name for each rank) at this cost: lines that begin with a key."""
    torn, problems = layout.apart(hosts), []
    for average in cost.averages:
        if average.seconds > config.clients.timeout_s:
            problems.append(
                f"clients.timeout_s: {config.clients.timeout_s:g} s are less than the average after {average.stage} takes on the "
                f"links, {duration(average.seconds)}; raise it, or send less (aggregate.precision, docs/compression.md)"
            )
    if torn:
        problems.append(
            f"topology.ranks_per_slot: {len(torn)} of {layout.num_slots} slots lie on several hosts (slot "
            f"{listed([str(slot) for slot in torn], 3)}), so that each of their steps crosses the network, which no second "
            "below counts; take a number that divides each host's ranks"
        )
    return problems
