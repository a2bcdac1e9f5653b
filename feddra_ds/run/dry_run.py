"""A launch without a training: all ranks meet, every group adds up one number, and that is all (topology.dry_run)."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from feddra_ds import strategies
from feddra_ds.common.logs import logger
from feddra_ds.common.text import duration
from feddra_ds.config.schema import Config
from feddra_ds.distributed.launch import Launch, choose_device
from feddra_ds.distributed.plan import Plan
from feddra_ds.distributed.topology import Topology
from feddra_ds.run.checks import POOLED, Checked, what_all_ranks_share
from feddra_ds.run.prediction import Predict, predicted


def dry_run(config: Config, found: Checked, predict: Predict | None = None) -> None:
    """Every rank calls it. Rank 0 logs who is where, and what was seen.

    Raises ConfigError and WaitTimeout as a training does, and RuntimeError where a group adds up wrongly.
    """
    dataset, ids, layout = found
    launch = Launch.from_environment()
    device = choose_device(config.run.device, launch.local_rank)
    memory = predicted(predict, config, layout, launch, device)
    began = time.monotonic()
    topology = Topology(
        layout,
        launch,
        device,
        config.clients.timeout_s,
        common=what_all_ranks_share(config, dataset, ids, device),
        client_ids=[POOLED] if strategies.build(config.strategy, config.dro).pools_data else ids,
        interface=config.topology.interface,
        memory=memory,
    )
    _add_up(topology, layout)
    topology.close()
    if topology.is_coordinator:
        peers = f" and each of {layout.ranks_per_slot} groups of {layout.num_slots} peers" * (layout.num_slots > 1)
        logger.info(
            "topology.dry_run: %s. They met, and each slot%s added up a number, in %s; nothing was trained",
            layout.describe(), peers, duration(time.monotonic() - began),
        )  # fmt: skip
        if memory is not None:
            logger.info("a rank needs %s at its peak; feddra-ds doctor --plan says what for", memory)


def _add_up(topology: Topology, layout: Plan) -> None:
    """The sum of the ranks' numbers in this rank's slot and among its peers."""
    number = torch.tensor([float(topology.rank)], device=topology.device)
    first = topology.slot * layout.ranks_per_slot
    groups = {"slot": (list(range(first, first + layout.ranks_per_slot)), number.clone())}
    dist.all_reduce(groups["slot"][1], group=topology.slot_group)
    if topology.peers is not None:
        groups["peers"] = (layout.peers_of(topology.slot_rank), number.clone())
        with topology.peers_meet("topology.dry_run"):
            topology.peers.allreduce([groups["peers"][1]]).wait()
    for name, (ranks, total) in groups.items():
        if int(total) != sum(ranks):
            raise RuntimeError(f"rank {topology.rank}: its {name} added up to {int(total)}, not to {sum(ranks)}")
