"""A DualEncoder in transformers' own classes: its encoders alone, or a VisionTextDualEncoderModel with equal embeddings.

That class has nothing between an encoder's pooled output and a linear projection without bias. A model here fits when
its heads are linear, it has no extra blocks, and each tower pools as its transformers encoder does. A layernorm at the
output is the projection with each output's mean over the dimensions taken off: its scale is lost when embeddings are
normalised. ViT- and BERT-like towers pool the first token without their pooler; the pooler of the exported encoder is
then a small multiple of the identity, which tanh leaves alone to 1e-8, and embeddings do not depend on the factor. A
batchnorm at the output is a scale and a bias. Such a pooler then hands on the directions that the projection reads, and
a constant, which is what the projection multiplies with the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from feddra_ds.model import SIDES
from feddra_ds.model.dual_encoder import POOLED_WITHOUT_POOLER, DualEncoder
from feddra_ds.model.encoders import new_encoder, probe_inputs
from feddra_ds.model.heads import BatchNorm, Head
from feddra_ds.model.towers import ENCODERS_OF_TWO

_POOLER_SCALE = 1e-4
_POOLINGS = {"clip_text_model": "last"}


@torch.no_grad()
def to_transformers(model: DualEncoder, processor: Callable[..., Any]) -> VisionTextDualEncoderModel:
    """A VisionTextDualEncoderModel with the same embeddings of what `processor` makes; its logit scale is 1/τ.

    Raises ValueError, saying why, where there is none.
    """
    config = model.config
    if config.head_kind != "linear":
        raise ValueError(
            "--format transformers: needs model.head.kind = linear; a VisionTextDualEncoderModel has no mlp head"
        )
    if config.head_bias:
        raise ValueError(
            "--format transformers: the projection of a model that began as a SigLIP has a bias, which a "
            "VisionTextDualEncoderModel's has not"
        )
    if config.num_extra_blocks:
        raise ValueError("--format transformers: needs model.num_extra_blocks = 0; there is no place for extra blocks")
    both = {side: _with_projection(model, side) for side in SIDES}
    towers = {side: encoder for side, (encoder, _) in both.items()}
    temperature = model.aligner.temperature()
    whole_config = VisionTextDualEncoderConfig(
        vision_config=towers["vision"].config.to_dict(),
        text_config=towers["text"].config.to_dict(),
        projection_dim=config.embedding_dim,
        logit_scale_init_value=math.log(1 / float(temperature)),
    )
    whole = VisionTextDualEncoderModel(whole_config, towers["vision"], towers["text"]).eval()
    for side, projection in (("vision", whole.visual_projection), ("text", whole.text_projection)):
        projection.weight.copy_(both[side][1])
    whole.config.architectures = [type(whole).__name__]
    _check_equal(model, whole, processor)
    return whole


def encoders_alone(model: DualEncoder) -> dict[str, PreTrainedModel]:
    """By side the encoder as transformers' own class, without what the model has above it.

    A pooler that the model does not use is not among its weights.
    """
    out: dict[str, PreTrainedModel] = {}
    for side in SIDES:
        encoder: Any = model.whole_encoder(side)
        name = ENCODERS_OF_TWO.get(encoder.config.model_type)
        if name is not None:  # T5's stack, whose class for a folder holds it under a name
            whole = getattr(transformers, name)._from_config(encoder.config)
            whole.encoder.load_state_dict(encoder.state_dict())
            encoder = whole
        encoder.config.architectures = [type(encoder).__name__]
        out[side] = encoder
    return out


def _with_projection(model: DualEncoder, side: str) -> tuple[PreTrainedModel, Tensor]:
    """The whole encoder, and the weight (D, H) of the projection that makes our embedding of what it pools."""
    encoder: Any = model.whole_encoder(side)
    weight, bias = _affine(getattr(model.aligner, side).head)
    kind, pooling = encoder.config.model_type, getattr(model.config, f"{side}_pooling")
    if model.config.use_poolers or (kind in POOLED_WITHOUT_POOLER and pooling == _POOLINGS.get(kind, "cls")):
        if bias is not None:
            raise ValueError(
                f"--format transformers: needs model.head.output_norm = none or layernorm; the running mean of a batchnorm "
                f"is a bias, for which a VisionTextDualEncoderModel with a {kind} encoder has no place"
            )
        return encoder, weight
    fresh = new_encoder(encoder.config, f"model.{side}")
    dense = getattr(getattr(fresh, "pooler", None), "dense", None)
    if pooling != "cls" or not isinstance(dense, nn.Linear) or dense.weight.shape[0] != dense.weight.shape[1]:
        raise ValueError(
            f"--format transformers: the {side} encoder ({kind}, {pooling} pooling) has no pooled output that equals ours"
        )
    fresh.load_state_dict(encoder.state_dict(), strict=False)
    nn.init.zeros_(dense.bias)
    if bias is None:
        dense.weight.copy_(_POOLER_SCALE * torch.eye(len(dense.weight)))
        return fresh, weight
    if not weight.isfinite().all():
        raise ValueError(
            f"--format transformers: weights of the {side} head are not finite, so a bias cannot be put before it"
        )
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    rank, width = len(s), len(dense.weight)
    if rank == width:
        raise ValueError(
            f"--format transformers: with a batchnorm at the output it needs model.embedding_dim below the {side} encoder's "
            f"width {width}, so that the pooler has room for a constant"
        )
    nn.init.zeros_(dense.weight)
    dense.weight[:rank] = _POOLER_SCALE * vh
    dense.bias[-1] = 1.0
    projection = torch.zeros(len(weight), width)
    projection[:, :rank] = u * s / _POOLER_SCALE
    projection[:, -1] = bias / math.tanh(1.0)
    return fresh, projection


def _affine(head: Head) -> tuple[Tensor, Tensor | None]:
    """A linear head with its output norm as a weight (D, H) and a bias (D,) or None, to a factor of the output."""
    (layer,), norm = head.layers, head.output_norm
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(norm, BatchNorm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        return weight * scale[:, None], -norm.running_mean * scale
    return (weight - weight.mean(0) if isinstance(norm, nn.LayerNorm) else weight), None


def _check_equal(model: DualEncoder, whole: VisionTextDualEncoderModel, processor: Callable[..., Any]) -> None:
    # The processor's own texts: CLIP's pooling looks for the end token that its tokenizer writes.
    texts = processor(text=["no finding", "a", "small effusion at the left base"], return_tensors="pt")
    inputs = {**probe_inputs(model.config.vision_config, "vision"), **texts}
    ours, theirs = model.eval()(**inputs), whole(**inputs)
    for side in ("image_embeds", "text_embeds"):
        if not torch.allclose(getattr(ours, side), getattr(theirs, side), atol=1e-4, equal_nan=True):
            raise ValueError(
                f"--format transformers: the {side} of a VisionTextDualEncoderModel would differ; use feddra"
            )
