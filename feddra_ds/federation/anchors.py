"""Where the anchors of equation (2) come from: the global model's features of the batches of a stage.

Each source is made when a stage begins, while the engine holds the global model (φ_g, θ_g). It gives the stage's
batches, and `of(step, …)` the anchors of a part of the batch of that step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from feddra_ds.data.loading.batch import Batch
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS
from feddra_ds.federation.step import features_of, model_inputs
from feddra_ds.objectives.base import Objective
from feddra_ds.objectives.features import TOKENS, Features, join

Fresh = Callable[[], Iterable[Batch]]  # gives a stage's batches, the same ones each time it is called


class NoAnchors:
    """The objective has none (anchor_weight is 0)."""

    def __init__(self, batches: Iterable[Batch]):
        self.batches = batches

    def of(self, step: int, rows: slice, batch: Batch, hidden: Any) -> Features | None:
        """The global model's features of some rows of a step's batch, whose backbone output is `hidden`; or None."""
        return None


class SharedBackbone(NoAnchors):
    """Stage 1: φ = φ_g throughout, so the client's backbone pass serves a frozen copy of θ_g too."""

    def __init__(self, batches: Iterable[Batch], engine: Engine, frozen_aligner: nn.Module, objective: Objective):
        super().__init__(batches)
        engine.copy_part(engine.module.get_submodule("aligner"), frozen_aligner)
        frozen_aligner.train(objective.options.anchor_mode == "train")
        self.aligner, self.objective = frozen_aligner, objective

    @torch.no_grad()
    def of(self, step: int, rows: slice, batch: Batch, hidden: Any) -> Features | None:
        with_tokens = TOKENS in self.objective.needs
        found = self.aligner(hidden, with_tokens)
        if not self.objective.normalises:
            found = [F.normalize(x.float(), dim=-1) for x in found]
        return Features(*found, text_mask=hidden.text.mask) if with_tokens else Features(*found)  # type: ignore[misc]


class Resident(NoAnchors):
    """Stage 2 with objective.anchors = resident: a frozen copy of the whole global model."""

    def __init__(self, batches: Iterable[Batch], engine: Engine, frozen_model: nn.Module, objective: Objective):
        super().__init__(batches)
        engine.copy_part(engine.module, frozen_model)
        frozen_model.train(objective.options.anchor_mode == "train")
        self.engine, self.model, self.objective = engine, frozen_model, objective

    def of(self, step: int, rows: slice, batch: Batch, hidden: Any) -> Features | None:
        return embed(self.model, batch, self.engine, self.objective)


class Replay(NoAnchors):
    """Stage 2 with objective.anchors = replay: computed before the first step, while the live weights are (φ_g, θ_g).

    The decoded batches (uint8) are kept too, up to `room` bytes; beyond, they are decoded a second time. `stored` has a
    batch's features each, `fresh` gives the batches once more.
    """

    def __init__(
        self,
        fresh: Fresh,
        engine: Engine,
        objective: Objective,
        micro_batch_size: int | None,
        room: int,
        *,
        with_tokens: bool = True,
    ):
        """with_tokens: the features are complete, not embeddings alone."""
        engine.train(objective.options.anchor_mode == "train")
        buffers = engine.snapshot(BUFFERS)
        kept: list[Batch] | None = []
        self.stored: list[Features] = []
        for batch in fresh():
            size = micro_batch_size or len(batch)
            parts = [embed(engine, batch[i : i + size], engine, objective) for i in range(0, len(batch), size)]
            whole = join(parts)
            self.stored.append(whole if with_tokens else Features(whole.image, whole.text))
            room -= batch.pixels.nbytes
            if kept is not None:
                kept.append(batch)
            if room < 0:
                kept = None
        for live, before in zip(engine.slices(BUFFERS), buffers, strict=True):
            live.copy_(before)  # in train mode a batchnorm has counted these batches
        self.fresh: Fresh = fresh if kept is None else lambda: kept
        super().__init__(self.fresh())

    def of(self, step: int, rows: slice, batch: Batch, hidden: Any) -> Features | None:
        return self.stored[step].rows(rows)


@torch.no_grad()
def embed(model: Any, batch: Batch, engine: Engine, objective: Objective) -> Features:
    """A model's features of a batch, without gradient."""
    out = model(**model_inputs(batch, engine), return_tokens=TOKENS in objective.needs)
    return features_of(out, objective)._replace(learned=())


def frozen_twin(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy without gradients, in the forward's dtype; made before DeepSpeed partitions the module."""
    return copy.deepcopy(module).requires_grad_(False).to(device=device, dtype=dtype)
