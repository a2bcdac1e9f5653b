"""The loss as torch operators: an autograd function for eager code, with or without a group, and custom ops with fakes
for torch.compile and meta tensors. (The first eager call of a custom op imports torch._dynamo, which takes seconds.)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from feddra_ds.losses import core
from feddra_ds.losses.chunked import compute_dtype
from feddra_ds.losses.core import Exchange, Inputs, Saved, Spec


@torch.library.custom_op("feddra_ds::dro_loss", mutates_args=())
def dro_loss(
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    sample_weight: Tensor | None,
    temperature: Tensor,
    bias: Tensor,
    anchor_weight: float,
    to_text: float,
    to_image: float,
    kind: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, per_sample, alignment, anchor, rx, ry, row, col, slope, weight_sum) of one process; see core.forward."""
    inputs = Inputs(image, text, image_anchor, text_anchor, sample_weight, temperature, bias)
    spec = Spec(kind, anchor_weight, (to_text, to_image), impl)  # type: ignore[arg-type]
    with torch.autocast(image.device.type, enabled=False):
        *results, saved, _ = core.forward(inputs, spec, core.Local())
    return (*results, *saved)  # type: ignore[return-value]


@dro_loss.register_fake
def _(
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    sample_weight: Tensor | None,
    temperature: Tensor,
    bias: Tensor,
    anchor_weight: float,
    to_text: float,
    to_image: float,
    kind: str,
    impl: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(image)
    scalars = [image.new_empty((), dtype=dtype) for _ in range(2)]
    vectors = [image.new_empty(image.shape[0], dtype=dtype) for _ in range(8)]
    return (scalars[0], *vectors, scalars[1])


@torch.library.custom_op("feddra_ds::dro_loss_backward", mutates_args=())
def dro_loss_backward(
    grad_total: Tensor,
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    sample_weight: Tensor | None,
    temperature: Tensor,
    bias: Tensor,
    rx: Tensor,
    ry: Tensor,
    row: Tensor,
    col: Tensor,
    slope: Tensor,
    weight_sum: Tensor,
    anchor_weight: float,
    to_text: float,
    to_image: float,
    kind: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (image, text, temperature, bias) of one process; see core.backward."""
    inputs = Inputs(image, text, image_anchor, text_anchor, sample_weight, temperature, bias)
    spec = Spec(kind, anchor_weight, (to_text, to_image), impl)  # type: ignore[arg-type]
    with torch.autocast(image.device.type, enabled=False):
        return core.backward(grad_total, inputs, Saved(rx, ry, row, col, slope, weight_sum), (), spec, core.Local())


@dro_loss_backward.register_fake
def _(
    grad_total: Tensor,
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    sample_weight: Tensor | None,
    temperature: Tensor,
    bias: Tensor,
    rx: Tensor,
    ry: Tensor,
    row: Tensor,
    col: Tensor,
    slope: Tensor,
    weight_sum: Tensor,
    anchor_weight: float,
    to_text: float,
    to_image: float,
    kind: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        image.new_empty(image.shape),
        text.new_empty(text.shape),
        temperature.new_empty(temperature.shape),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[4:])
    ctx.constants = inputs[7:]


def _autograd(ctx: Any, grad_total: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    image, text, temperature, bias = dro_loss_backward(grad_total, *ctx.saved_tensors, *ctx.constants)
    return image, text, None, None, None, temperature, bias, None, None, None, None, None


dro_loss.register_autograd(_autograd, setup_context=_setup_context)


class DroLossFunction(torch.autograd.Function):
    """core.forward and core.backward in eager code."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, exchange: Exchange, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        with torch.autocast(inputs.image.device.type, enabled=False):
            *results, saved, kept = core.forward(inputs, spec, exchange)
        ctx.spec, ctx.exchange = spec, exchange
        ctx.save_for_backward(*inputs, *saved, *kept)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, saved, kept = Inputs(*tensors[:8]), Saved(*tensors[8:14]), tensors[14:]
        with torch.autocast(inputs.image.device.type, enabled=False):
            image, text, temperature, bias = core.backward(grads[0], inputs, saved, kept, ctx.spec, ctx.exchange)
        return None, None, image, text, None, None, None, temperature, bias, None
