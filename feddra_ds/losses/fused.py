"""The loss of a client's batch, equations (1)-(3): alignment, anchors and weights in one pass, never a B×B matrix.

`fused_dro_loss` is the entry; docs/kernels.md tells how it works. Shape letters: B pairs on this rank, D dimensions.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from feddra_ds.distributed.collectives import (
    Group,
    gather,
    group_rank,
    group_size,
    require_equal_shapes,
    scale_gradient,
)
from feddra_ds.losses.core import Local, Spec, check_weights
from feddra_ds.losses.dispatch import resolve_impl
from feddra_ds.losses.exchange import Gather, Ring
from feddra_ds.losses.ops import DroLossFunction, dro_loss
from feddra_ds.losses.reference import alignment_per_pair, direction_weights, reference_loss
from feddra_ds.losses.types import DroLoss, Duplicates, Exchange, Impl, Kind, Reduction

__all__ = ["DroLoss", "alignment_per_pair", "fused_dro_loss"]

RING_BYTES = 256 * 2**20  # `exchange="auto"` holds the gathered texts up to this size, beyond it they go round a ring


def fused_dro_loss(
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None = None,
    text_anchor: Tensor | None = None,
    *,
    temperature: Tensor | float,
    anchor_weight: float = 0.0,
    sample_weight: Tensor | None = None,
    direction_reduction: Reduction | tuple[float, float] = "sum",
    group: Group | None = None,
    impl: Impl = "auto",
    kind: Kind = "ita",
    bias: Tensor | float | None = None,
    exchange: Exchange = "auto",
    text_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
) -> DroLoss:
    """Equations (1)-(3) on a client's batch.

    image, text, *_anchor: (B, D) of any floating dtype, on one device, normalised inside; arithmetic in float32
    (float64 for float64 inputs), matrix products of bfloat16 and float16 inputs on tensor cores in their dtype.
    temperature: τ > 0, a number or a one-element tensor that receives its gradient.
    anchor_weight: λ₂; the anchors are constants.
    sample_weight: (B,) ≥ 0, a constant; None weighs all pairs alike. Given on a GPU, the call waits for it once.
    direction_reduction: sum or mean of image → text and text → image, or the weight of each, ≥ 0 (ConVIRT's λ, 1 − λ).
    group: the ranks of one client, whose texts are this batch's negatives; None is one process, never WORLD.
    kind: ita, equation (1), or siglip, with row_j = Σ_k softplus(−z_jk (S_jk + bias)), z = 1 on the diagonal and −1
        off it, columns alike (with `mean` the total is the SigLIP paper's).
    bias: for siglip only, a number or a one-element tensor that receives its gradient (default 0).
    exchange: how a group's texts meet: gather (W·B·D held on each rank), ring (2·B·D), auto by size.
    text_ids: (B,) int64, equal where two pairs have the same report; needed where duplicates is not negative.
    duplicates: what the same report of another pair is, over the whole group: a negative, a positive, or ignored
        (reference.both_directions). Only reference and chunked know the last two, and auto takes chunked for them.

    The gradient of the embeddings is their slice of the full batch's gradient; a temperature or bias that is
    replicated over the group receives this rank's additive share. Multiply `total` by the group's size where the
    engine averages gradients over the group. Every rank of the group must run the backward pass, with one upstream
    gradient. NaN in gives NaN out.

    Raises ValueError for arguments that contradict each other, for weights that are negative or sum to 0 over the
    group, and for ranks whose batches differ in shape (with the shapes, on every rank).
    """
    _check(image, text, image_anchor, text_anchor, temperature, anchor_weight, sample_weight, kind, bias)
    _check_ids(image, text_ids, duplicates, kind)
    directions = direction_weights(direction_reduction)
    for name, value, known in (
        ("impl", impl, Impl),
        ("kind", kind, Kind),
        ("exchange", exchange, Exchange),
        ("duplicates", duplicates, Duplicates),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")
    dtype = torch.promote_types(image.dtype, text.dtype)
    image, text = image.to(dtype), text.to(dtype)
    impl = resolve_impl(impl, image, duplicates)
    tau, offset = (_scalar(x, image) for x in (temperature, 0.0 if bias is None else bias))
    ids = None if duplicates == "negative" else text_ids
    tensors = (image, text, image_anchor, text_anchor, sample_weight, tau, offset)
    spec = Spec(kind, anchor_weight, directions, impl, duplicates)
    if group is not None and group_size(group) > 1:
        return _over_group(group, exchange, spec, *tensors, ids)
    if impl == "reference":
        return _reference(spec, *tensors, ids)
    traced = torch.compiler.is_compiling() or image.is_meta or type(image) not in (Tensor, torch.nn.Parameter)
    if traced and ids is None:
        total, *reported = dro_loss(*tensors, anchor_weight, *directions, kind, impl)[:4]
        return DroLoss(total, *(x.detach() for x in reported))
    return DroLoss(*DroLossFunction.apply(spec, Local(), *tensors, ids))


def _over_group(group: Group, exchange: Exchange, spec: Spec, *tensors: Tensor | None) -> DroLoss:
    image = tensors[0]
    assert image is not None
    require_equal_shapes(image, group, "fused_dro_loss")
    if spec.impl == "reference":
        # every rank computes the full batch; the replicated scalars get an equal share on each
        rows, share = len(image), 1 / group_size(group)
        *batch, ids = (None if x is None else gather(x, group, "slice") for x in (*tensors[:5], tensors[7]))
        tau, bias = (scale_gradient(x, share) for x in tensors[5:7] if x is not None)
        mine = slice(group_rank(group) * rows, (group_rank(group) + 1) * rows)
        total, *reported = _reference(spec, *batch, tau, bias, ids)  # type: ignore
        return DroLoss(total, *(x[mine] for x in reported))
    if exchange == "auto":
        exchange = "ring" if image.nbytes * group_size(group) > RING_BYTES else "gather"
    return DroLoss(*DroLossFunction.apply(spec, (Ring if exchange == "ring" else Gather)(group), *tensors))


def _reference(
    spec: Spec,
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    sample_weight: Tensor | None,
    temperature: Tensor,
    bias: Tensor,
    text_ids: Tensor | None,
) -> DroLoss:
    if sample_weight is not None:
        check_weights(sample_weight.sum(), (sample_weight < 0).sum())
    with torch.autocast(image.device.type, enabled=False):
        return reference_loss(
            image, text, image_anchor, text_anchor, sample_weight, temperature, bias, spec.anchor_weight,
            spec.directions, spec.kind, text_ids, spec.duplicates,
        )  # fmt: skip


def _scalar(x: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(like.device)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), x, dtype=dtype, device=like.device)  # not torch.tensor: that one waits for a GPU


def _check_ids(image: Tensor, text_ids: Tensor | None, duplicates: Duplicates, kind: Kind) -> None:
    if text_ids is not None and text_ids.shape != image.shape[:1]:
        raise ValueError(f"text_ids must be one id for each of the {len(image)} pairs, not {tuple(text_ids.shape)}")
    if duplicates == "negative":
        return
    if text_ids is None:
        raise ValueError(f"duplicates={duplicates!r} needs text_ids, which say what reports are the same")
    if kind != "ita":
        raise ValueError(f"duplicates={duplicates!r} is for kind='ita', not {kind!r}")


def _check(
    image: Tensor,
    text: Tensor,
    image_anchor: Tensor | None,
    text_anchor: Tensor | None,
    temperature: Tensor | float,
    anchor_weight: float,
    sample_weight: Tensor | None,
    kind: Kind,
    bias: Tensor | float | None,
) -> None:
    if image.ndim != 2 or image.shape != text.shape or 0 in image.shape:
        raise ValueError(f"image and text must both be (B, D), not {tuple(image.shape)} and {tuple(text.shape)}")
    if not (image.is_floating_point() and text.is_floating_point()):
        raise ValueError(f"image and text must be floating, not {image.dtype} and {text.dtype}")
    if (image_anchor is None) != (text_anchor is None):
        raise ValueError("image_anchor and text_anchor: give both or neither")
    for name, anchor in (("image_anchor", image_anchor), ("text_anchor", text_anchor)):
        if anchor is not None and (anchor.shape != image.shape or anchor.requires_grad):
            raise ValueError(
                f"{name} must be a constant of shape {tuple(image.shape)}, not {tuple(anchor.shape)} with "
                f"requires_grad={anchor.requires_grad}; detach it"
            )
    if not (math.isfinite(anchor_weight) and anchor_weight >= 0):
        raise ValueError(f"anchor_weight must be finite and ≥ 0, not {anchor_weight}")
    if anchor_weight > 0 and image_anchor is None:
        raise ValueError(f"anchor_weight is {anchor_weight}, but there are no anchors")
    if sample_weight is not None and (sample_weight.shape != image.shape[:1] or sample_weight.requires_grad):
        raise ValueError(
            f"sample_weight must be a constant of shape {tuple(image.shape[:1])}, not {tuple(sample_weight.shape)} "
            f"with requires_grad={sample_weight.requires_grad}"
        )
    if kind == "ita" and bias is not None:
        raise ValueError("bias is for kind='siglip'; equation (1) does not depend on one")
    for name, value in (("temperature", temperature), ("bias", bias)):
        if isinstance(value, Tensor) and (value.numel() != 1 or not value.is_floating_point()):
            raise ValueError(f"{name} must have one floating element, not {tuple(value.shape)} of {value.dtype}")
    if not isinstance(temperature, Tensor) and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, not {temperature}")
