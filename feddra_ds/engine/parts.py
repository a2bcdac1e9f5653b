"""The two parts of a model, what travels beside them, and the host states of both."""

from __future__ import annotations

from torch import Tensor

PARTS = ("aligner", "backbone")
FROZEN = "frozen"  # not trained: weights under adapters that the server moves, fp32 on the host (adapter.aggregation)
BUFFERS = "buffers"  # what is not trained but travels: running statistics, counters
PartState = list[Tensor]  # one flat host tensor per slice of a part, in the engine's order

ModelState = dict[str, PartState]
