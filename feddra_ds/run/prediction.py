"""What a rank is predicted to need, for the plan that a launch shows; who calls a training brings the prediction along."""

from __future__ import annotations

from collections.abc import Callable

import torch

from feddra_ds.common.logs import logger
from feddra_ds.common.text import first_line
from feddra_ds.config.schema import Config
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.plan import Plan
from feddra_ds.distributed.topology import Memory

Predict = Callable[[Config, Plan, str], Memory]  # of a config and a plan, on cpu or cuda


def predicted(
    predict: Predict | None, config: Config, layout: Plan, launch: Launch, device: torch.device
) -> Memory | None:
    """At rank 0 of several ranks, or of a dry run; None elsewhere, and where the prediction fails, which ends no run."""
    is_alone = launch.world_size == 1 and not config.topology.dry_run
    if predict is None or launch.rank != 0 or is_alone:
        return None
    try:
        return predict(config, layout, device.type)
    except Exception as error:
        logger.warning("the memory of a rank could not be predicted: %s", first_line(error))
        return None
