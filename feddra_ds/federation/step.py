"""One local step: the client's whole batch through the loss, backward, optimizer step (equation 3).

`LocalStep` sees the batch in one piece, or, where data.micro_batch_size bounds memory, in micro-batches by two-pass
gradient caching: embed all micro-batches without graph, take the loss and its gradient on the whole batch's
embeddings, then run each micro-batch again with its graph and push that gradient through. The contrastive batch stays
whole, and so do its negatives; the gradient is the same to rounding.

b: pairs of this rank · m: pairs of a micro-batch · D: embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from feddra_ds.data.loading.batch import Batch
from feddra_ds.engine.engine import Engine
from feddra_ds.objectives.base import Anchors, Objective

# (rows of this rank's batch, that part of the batch, its backbone output) → its anchors
AnchorSource = Callable[[slice, Batch, Any], Anchors | None]


class LocalStep:
    """Callable: trains on one batch and returns its loss, equal on every rank of the client's group."""

    def __init__(
        self, engine: Engine, objective: Objective, group: dist.ProcessGroup | None, micro_batch_size: int | None
    ):
        self.engine, self.objective, self.group, self.micro_batch_size = engine, objective, group, micro_batch_size
        self.last_anchors: Anchors | None = None  # of the newest batch, whole, for dro.evaluate_on = anchors

    def __call__(self, batch: Batch, anchors: AnchorSource, *, train_backbone: bool, weight: float) -> float:
        """Step on this rank's part of a batch; `weight` scales the whole loss.

        A loss that is not finite skips backward and step, on every rank alike. Collective over the group.
        """
        parts = list(self._parts(batch))
        run = self._whole if len(parts) == 1 else self._cached
        return run(parts, anchors, train_backbone, weight)

    def _parts(self, batch: Batch) -> Iterator[tuple[slice, Batch]]:
        size = self.micro_batch_size or len(batch)
        for start in range(0, len(batch), size):
            rows = slice(start, min(start + size, len(batch)))
            yield rows, batch if rows == slice(0, len(batch)) else batch[rows]

    def _forward(self, batch: Batch, train_backbone: bool) -> Any:
        return self.engine(**model_inputs(batch, self.engine), freeze_backbone=not train_backbone, return_hidden=True)

    def _whole(
        self, parts: list[tuple[slice, Batch]], anchors: AnchorSource, train_backbone: bool, weight: float
    ) -> float:
        rows, batch = parts[0]
        out = self._forward(batch, train_backbone)
        self.last_anchors = anchors(rows, batch, out.hidden)
        losses = self.objective(out.image_embeds, out.text_embeds, out.temperature, self.last_anchors, self.group)
        value = float(losses.total.detach())
        if math.isfinite(value):
            self.engine.backward(weight * losses.total)
            self.engine.step()
        return value

    def _cached(
        self, parts: list[tuple[slice, Batch]], anchors: AnchorSource, train_backbone: bool, weight: float
    ) -> float:
        images, texts, found, states = [], [], [], []
        temperature: Tensor
        for rows, batch in parts:
            states.append(_random_state(self.engine.device))
            with torch.no_grad():
                out = self._forward(batch, train_backbone)
                found.append(anchors(rows, batch, out.hidden))
            images.append(out.image_embeds)
            texts.append(out.text_embeds)
            temperature = out.temperature
        whole = None
        if found[0] is not None:
            whole = Anchors(*(torch.cat(column) for column in zip(*found, strict=True)))  # type: ignore[arg-type]
        self.last_anchors = whole
        leaves = [x.detach().requires_grad_() for x in (torch.cat(images), torch.cat(texts), temperature)]
        losses = self.objective(leaves[0], leaves[1], leaves[2], whole, self.group)
        value = float(losses.total.detach())
        if not math.isfinite(value):
            return value
        gradients = torch.autograd.grad(weight * losses.total, leaves)
        for (rows, batch), state in zip(parts, states, strict=True):
            with _replayed(state, self.engine.device):  # the same dropout as in the first pass
                out = self._forward(batch, train_backbone)
            carrier = (out.image_embeds * gradients[0][rows]).sum() + (out.text_embeds * gradients[1][rows]).sum()
            carrier = carrier + (out.temperature * gradients[2]).sum() / len(parts)
            self.engine.backward(carrier)
            self.engine.step()  # DeepSpeed steps at the last micro-batch
        return value


def model_inputs(batch: Batch, engine: Engine) -> dict[str, Tensor]:
    """The tensors of a batch that the model takes, on the engine's device and in its dtype."""
    moved = batch.to(engine.device, non_blocking=True)
    return {
        "pixel_values": moved.pixel_values.to(engine.dtype),
        "input_ids": moved.input_ids,
        "attention_mask": moved.attention_mask,
    }


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _replayed:
    """Run with an earlier random state, then go on with the present one."""

    def __init__(self, state: list[Tensor], device: torch.device):
        self.state, self.device = state, device

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.device)

    def __enter__(self) -> None:
        self.now = _random_state(self.device)
        self._set(self.state)

    def __exit__(self, *_: object) -> None:
        self._set(self.now)
