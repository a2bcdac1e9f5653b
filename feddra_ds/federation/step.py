"""One local step: the client's whole batch through the loss of equation (3), backward, optimizer step.

`LocalStep` sees the batch in one piece, or, where data.micro_batch_size bounds memory, in micro-batches by two-pass
gradient caching: embed all micro-batches without graph, take the loss and its gradient on the whole batch's
features, then run each micro-batch again with its graph and push that gradient through. The contrastive batch stays
whole, and so do its negatives; the gradient is the same to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.words import Words
from feddra_ds.distributed.collectives import all_sum, gather
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.pairs import Pairs
from feddra_ds.federation.schedule import Stage
from feddra_ds.objectives.base import Objective
from feddra_ds.objectives.features import ROWS, TOKENS, Features, join


class StepObserver:
    """Is told of every local step; this one does nothing. run/debug.py has one that writes down what it sees."""

    round_index = 0

    def begin_step(self, client: str, stage: Stage, step: int) -> None:
        """A client's step begins."""

    def before_update(self) -> None:
        """The gradients of the step are there, and the optimizer comes next; not called where the loss is not finite."""

    def end_step(self, value: float) -> None:
        """The step has ended with this loss."""


# (rows of this rank's batch, that part of the batch, its backbone output) → the global model's features of it
AnchorsOf = Callable[[slice, Batch, Any], Features | None]
# (features of this rank's batch, the global model's of it) → what the strategy adds to the batch's loss, a scalar
AddedLoss = Callable[[Features, Features | None], Tensor]
Parts = list[tuple[slice, Batch]]


class LocalStep:
    """Callable: trains on one batch and returns its loss, equal on every rank of the client's group."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        group: dist.ProcessGroup | None,
        micro_batch_size: int | None,
        observer: StepObserver,
        words: Words | None = None,
    ):
        """words: gives Features.words, where the objective needs them."""
        self.engine, self.objective, self.group, self.micro_batch_size = engine, objective, group, micro_batch_size
        self.observer, self.words = observer, words
        self.pairs: Pairs | None = None  # of the client that trains, where the objective keeps something of its pairs
        self.was_taken = True  # whether the newest step changed the weights
        self.added_loss: AddedLoss | None = None  # of the newest step
        # of the newest batch, whole and without gradient: for dro.evaluate_on = anchors and anchor_gradient_ratio
        self.last_features: Features | None = None
        self.last_anchors: Features | None = None

    def __call__(
        self,
        batch: Batch,
        anchors: AnchorsOf,
        *,
        train_backbone: bool,
        weight: float,
        added_loss: AddedLoss | None = None,
    ) -> float:
        """Step on this rank's part of a batch; `weight` scales the whole loss.

        A loss or a gradient that is not finite changes nothing, on every rank alike: see `was_taken`. Collective over the
        group.
        """
        self.was_taken, self.added_loss = False, added_loss
        parts = list(self._parts(batch))
        run = self._whole if len(parts) == 1 else self._cached
        value = run(parts, anchors, train_backbone, weight)
        if self.pairs is not None and self.was_taken:
            self._remember(self.pairs, batch)
        return value

    def _remember(self, pairs: Pairs, batch: Batch) -> None:
        """Have the client's pairs keep what the objective wants kept, on every rank of the slot."""
        assert self.last_features is not None
        with torch.no_grad():
            values = self.objective.remember(self.last_features, self.group)
        ids = pairs.ids(batch.keys).to(values.device)
        pairs.keep(gather(ids, self.group, "slice"), gather(values, self.group, "slice"))

    def _parts(self, batch: Batch) -> Iterator[tuple[slice, Batch]]:
        size = self.micro_batch_size or len(batch)
        for start in range(0, len(batch), size):
            rows = slice(start, min(start + size, len(batch)))
            yield rows, batch if rows == slice(0, len(batch)) else batch[rows]

    def _forward(self, batch: Batch, train_backbone: bool) -> tuple[Features, Any]:
        """The features of a part of the batch, and the backbone's output."""
        out = self.engine(
            **model_inputs(batch, self.engine),
            freeze_backbone=not train_backbone,
            return_hidden=True,
            return_tokens=TOKENS in self.objective.needs,
            normalize=not self.objective.takes_head_outputs,
        )
        words = None
        if self.words is not None:
            words = self.words(batch.input_ids, batch.attention_mask).to(self.engine.device, non_blocking=True)
        text_ids = batch.text_ids.to(self.engine.device, non_blocking=True)
        kept = None if self.pairs is None else self.pairs.of(batch.keys).to(self.engine.device, non_blocking=True)
        return features_of(out, self.objective)._replace(text_ids=text_ids, words=words, kept=kept), out.hidden

    def _loss(self, features: Features, anchors: Features | None) -> Tensor:
        """Of the whole batch, from the features of this rank's part of it: the objective's, and what the strategy adds."""
        self.last_anchors = anchors if self.objective.needs_anchors else None
        total: Tensor = self.objective(features, self.last_anchors, self.group).total
        return total if self.added_loss is None else total + self.added_loss(features, anchors)

    def _to_look_at(self, features: Features) -> Features:
        """Embeddings of unit norm in fp32 without their graph, whatever the loss takes."""
        leaves = _as_leaves(features)
        if not self.objective.takes_head_outputs:
            return leaves
        image, text = (F.normalize(x.detach().float(), dim=-1) for x in (features.image, features.text))
        return leaves._replace(image=image, text=text)

    def _whole(self, parts: Parts, anchors: AnchorsOf, train_backbone: bool, weight: float) -> float:
        rows, batch = parts[0]
        features, hidden = self._forward(batch, train_backbone)
        self.last_features = self._to_look_at(features)
        total = self._loss(features, anchors(rows, batch, hidden))
        value = float(total.detach())
        if math.isfinite(value):
            self.engine.backward(weight * total)
            self.observer.before_update()
            self.was_taken = self.engine.step()
        return value

    def _cached(self, parts: Parts, anchors: AnchorsOf, train_backbone: bool, weight: float) -> float:
        found, theirs, states = [], [], []
        for rows, batch in parts:
            states.append(_random_state(self.engine.device))
            with torch.no_grad():
                features, hidden = self._forward(batch, train_backbone)
                found.append(features)
                theirs.append(anchors(rows, batch, hidden))
        known = [one for one in theirs if one is not None]
        leaves = _as_leaves(join(found))
        self.last_features = self._to_look_at(leaves)
        total = self._loss(leaves, join(known) if known else None)
        value = float(total.detach())
        if not math.isfinite(value):
            return value
        trained = {place: x for place, x in leaves.tensors().items() if x.requires_grad}
        found_gradients = torch.autograd.grad(weight * total, list(trained.values()), allow_unused=True)
        gradients = dict(zip(trained, found_gradients, strict=True))
        for (rows, batch), state in zip(parts, states, strict=True):
            with _replayed(state, self.engine.device):  # the same dropout as in the first pass
                features, _ = self._forward(batch, train_backbone)
            self.engine.backward(_carrier(features, gradients, rows, len(parts)))
            if rows == parts[-1][0]:
                self.observer.before_update()
            self.was_taken = self.engine.step()  # at the last micro-batch
        return value


def _as_leaves(features: Features) -> Features:
    """Constants that collect a gradient, where a field can have one."""
    leaf = lambda x: x.detach().requires_grad_() if x.is_floating_point() else x
    return features.with_tensors({place: leaf(x) for place, x in features.tensors().items()})


def anchor_gradient_ratio(
    objective: Objective, features: Features, anchors: Features, group: dist.ProcessGroup | None
) -> float:
    """‖∂ λ₂ ANC‖ / ‖∂ λ₁ ITA‖ by the embeddings of a whole batch, of which this rank holds `features`: how hard the anchors pull.

    Two losses on embeddings, nothing of the model. Collective over the group, equal on its ranks.
    """
    leaves = _as_leaves(features)
    embeddings = [x for (name, _), x in leaves.tensors().items() if name in ROWS and x.requires_grad]

    def gradients(theirs: Features | None) -> list[Tensor]:
        total = objective(leaves, theirs, group).total
        found = torch.autograd.grad(total, embeddings, allow_unused=True, materialize_grads=True)
        return [x.double() for x in found]

    alignment = gradients(None)
    pull = [both - alone for both, alone in zip(gradients(anchors), alignment, strict=True)]
    squares = [torch.stack([x.square().sum() for x in parts]).sum() for parts in (pull, alignment)]
    anchor, ita = all_sum(torch.stack(squares), group)
    return float((anchor / ita).sqrt())


def _carrier(
    features: Features, gradients: Mapping[tuple[str, int], Tensor | None], rows: slice, num_parts: int
) -> Tensor:
    """A scalar whose gradient by the features of some rows is what the whole batch's loss gave them."""
    total: Any = 0.0
    values = features.tensors()
    for place, gradient in gradients.items():
        if gradient is None:
            continue  # the loss does not depend on it
        if place[0] in ROWS:
            total = total + (values[place].float() * gradient[rows].float()).sum()
        else:  # one for the whole batch: each part carries its share
            total = total + (values[place] * gradient).sum() / num_parts
    return total


def features_of(out: Any, objective: Objective) -> Features:
    """The features in a model's output, with tokens where the objective needs them."""
    tokens: dict[str, Tensor] = {}
    if TOKENS in objective.needs:
        tokens = {"image_tokens": out.image_tokens, "text_tokens": out.text_tokens, "text_mask": out.text_mask}
    return Features(
        out.image_embeds, out.text_embeds, temperature=out.temperature, learned=tuple(out.learned or ()), **tokens
    )


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
