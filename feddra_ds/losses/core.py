"""Forward and backward of equation (3) over blocks: what surrounds the tile loops, for one process or a group.

`tiles` is the module with the tile loops (chunked or triton_kernels), `exchange` says whose columns a rank's rows
meet: `Local` its own, distributed.py those of the whole group.

Shape letters: B pairs on this rank, D embedding dimensions.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from feddra_ds.distributed.collectives import Group, all_sum
from feddra_ds.losses.types import Duplicates, Kind, Same


@dataclass(frozen=True)
class Spec:
    """What does not change from batch to batch."""

    kind: Kind
    anchor_weight: float
    directions: tuple[float, float]  # weights of image → text and text → image: (1, 1) is their sum, (½, ½) their mean
    impl: str  # chunked | triton
    duplicates: Duplicates = "negative"

    @property
    def tiles(self) -> Any:
        return importlib.import_module("feddra_ds.losses." + {"triton": "triton_launch"}.get(self.impl, self.impl))

    def same(self, rows: Tensor | None, columns: Tensor | None) -> Same | None:
        """What a block has to know of equal reports, from the ids of its rows and columns."""
        if rows is None or columns is None:
            return None
        return Same(rows, columns, self.duplicates == "positive")


class Columns(NamedTuple):
    """The (B, D) texts of a rank as columns, each with what a row needs to know of it, all (B,)."""

    y: Tensor
    ry: Tensor  # reciprocal norm
    ids: Tensor | None  # equal for equal reports; None where these are negatives


class Exchange(Protocol):
    group: Group | None

    def stats(
        self, spec: Spec, x: Tensor, rx: Tensor, own: Columns, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """(row, col, S_jj) of this rank's pairs against the whole group (chunked.py), and tensors kept for `grads`."""
        ...

    def grads(
        self,
        spec: Spec,
        x: Tensor,
        rx: Tensor,
        own: Columns,
        row: Tensor,
        col: Tensor,
        row_coef: Tensor,
        col_coef: Tensor,
        diagonal: Tensor,
        scale: Tensor,
        bias: Tensor,
        kept: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(Σ G v, Σ Gᵀ u) of this rank's pairs, both (B, D), and this rank's shares of Σ G S and Σ G."""
        ...


class Local:
    """One process: the batch is its own."""

    group: Group | None = None

    def stats(
        self, spec: Spec, x: Tensor, rx: Tensor, own: Columns, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        same = spec.same(own.ids, own.ids)
        return (*spec.tiles.block_stats(x, own.y, rx, own.ry, scale, bias, True, spec.kind, same), ())

    def grads(
        self,
        spec: Spec,
        x: Tensor,
        rx: Tensor,
        own: Columns,
        row: Tensor,
        col: Tensor,
        row_coef: Tensor,
        col_coef: Tensor,
        diagonal: Tensor,
        scale: Tensor,
        bias: Tensor,
        kept: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        du, dv = (torch.zeros(x.shape, dtype=rx.dtype, device=x.device) for _ in range(2))
        same = spec.same(own.ids, own.ids)
        sums = spec.tiles.block_grads(
            x, own.y, rx, own.ry, row, col, row_coef, col_coef, scale, bias, diagonal, spec.kind, du, dv, same
        )
        return du, dv, *sums


class Inputs(NamedTuple):
    """Tensors of one call; `temperature` and `bias` have one element each."""

    image: Tensor
    text: Tensor
    image_anchor: Tensor | None
    text_anchor: Tensor | None
    sample_weight: Tensor | None
    temperature: Tensor
    bias: Tensor
    text_ids: Tensor | None = None  # None where equal reports are negatives


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs: (B,) each (row, col: see chunked.py), and the scalar Σ w."""

    rx: Tensor
    ry: Tensor
    row: Tensor  # ita: the logsumexp of a row of S, diagonal and all
    col: Tensor
    slope: Tensor  # −∂alignment_j/∂S_jj
    weight_sum: Tensor


def forward(
    inputs: Inputs, spec: Spec, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor, Tensor, Saved, tuple[Tensor, ...]]:
    """(total, per_sample, alignment, anchor, saved, kept). Raises ValueError for weights that sum to 0 or are < 0."""
    tiles = spec.tiles
    rx, image_distance = tiles.row_norms(inputs.image, inputs.image_anchor)
    ry, text_distance = tiles.row_norms(inputs.text, inputs.text_anchor)
    scale, bias = _scalars(inputs, rx)
    row, col, diag, kept = exchange.stats(
        spec, inputs.image, rx, Columns(inputs.text, ry, inputs.text_ids), scale, bias
    )
    zero = torch.zeros_like(diag)
    if spec.kind == "siglip":
        on_diagonal = torch.logaddexp(zero, -(diag + bias))
        row_loss, col_loss = row + on_diagonal, col + on_diagonal
        row_slope = col_slope = torch.sigmoid(-(diag + bias))
    else:
        row_loss, row_slope, row = _direction(row, diag)
        col_loss, col_slope, col = _direction(col, diag)
    to_text, to_image = spec.directions
    alignment, slope = to_text * row_loss + to_image * col_loss, to_text * row_slope + to_image * col_slope
    anchor = image_distance + text_distance
    per_sample = alignment + spec.anchor_weight * anchor
    w = _weights(inputs, rx)
    sums = all_sum(torch.stack([(w * per_sample).sum(), w.sum(), (w < 0).sum().to(w.dtype)]), exchange.group)
    if inputs.sample_weight is not None:
        check_weights(sums[1], sums[2])
    return sums[0] / sums[1], per_sample, alignment, anchor, Saved(rx, ry, row, col, slope, sums[1].clone()), kept


def _direction(stat: Tensor, diag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, −∂loss/∂S_jj, what the backward pass needs of the row) of one direction, from its statistic off the diagonal."""
    if stat.ndim == 1:
        loss = torch.logaddexp(torch.zeros_like(diag), stat - diag)
        return loss, torch.sigmoid(stat - diag), diag + loss
    others, equal = stat
    positives = torch.logaddexp(diag, equal)
    loss = torch.logaddexp(torch.zeros_like(diag), others - positives)
    slope = torch.sigmoid(others - positives) * (diag - positives).exp()
    return loss, slope, torch.stack([positives + loss, positives])


def backward(
    grad_total: Tensor, inputs: Inputs, saved: Saved, kept: tuple[Tensor, ...], spec: Spec, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (image, text, temperature, bias): of the embeddings whole, of the scalars this rank's share."""
    tiles = spec.tiles
    rx, ry, row, col, slope, weight_sum = saved
    scale, bias = _scalars(inputs, rx)
    per_sample_grad = _weights(inputs, rx) * (grad_total.to(rx.dtype) / weight_sum)
    row_coef, col_coef = (per_sample_grad * weight for weight in spec.directions)
    own = Columns(inputs.text, ry, inputs.text_ids)
    du, dv, sum_gs, sum_g = exchange.grads(
        spec, inputs.image, rx, own, row, col, row_coef, col_coef, -per_sample_grad * slope, scale, bias, kept
    )
    anchor_coef = per_sample_grad * spec.anchor_weight
    image_grad = tiles.finish_grads(inputs.image, rx, inputs.image_anchor, du, scale, anchor_coef)
    text_grad = tiles.finish_grads(inputs.text, ry, inputs.text_anchor, dv, scale, anchor_coef)
    temperature_grad = (-sum_gs * scale).to(inputs.temperature.dtype).reshape(inputs.temperature.shape)
    return image_grad, text_grad, temperature_grad, sum_g.to(inputs.bias.dtype).reshape(inputs.bias.shape)


def check_weights(total: Tensor, num_negative: Tensor) -> None:
    """Raises ValueError for weights that cannot be averaged with. The one place that waits for the device."""
    weight_sum, negative = torch.stack([total, num_negative.to(total.dtype)]).tolist()
    if negative or weight_sum == 0:
        problem = f"{negative:.0f} of them are negative" if negative else "they sum to 0"
        raise ValueError(f"sample_weight must be ≥ 0 with a positive sum over the group, but {problem}")


def _scalars(inputs: Inputs, like: Tensor) -> tuple[Tensor, Tensor]:
    """1/τ and the bias, 0-dimensional, in the dtype of the arithmetic."""
    return 1 / inputs.temperature.to(like.dtype).reshape(()), inputs.bias.to(like.dtype).reshape(())


def _weights(inputs: Inputs, like: Tensor) -> Tensor:
    return torch.ones_like(like) if inputs.sample_weight is None else inputs.sample_weight.to(like.dtype)
