"""The dual encoder: backbone φ (two encoders without their tops) and alignment module θ, one transformers model.

Single-device code: it knows no ranks. Parameter names start with `backbone.` or `aligner.`; the two are disjoint.

Legend: B batch, C channels, S image side, T tokens, D embedding size.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from feddra_ds.model import SIDES, encoders, towers
from feddra_ds.model.dual_encoder_config import DualEncoderConfig
from feddra_ds.model.heads import BatchNorm, ExtraBlock, Head, Learned, Temperature, TowerAligner, own_batchnorms
from feddra_ds.model.towers import TowerHidden
from feddra_ds.model.weights.deferred import recording
from feddra_ds.model.weights.tape import CannotDefer

_MAX_CHECKED_PARAMETERS = 400_000_000


class Hidden(NamedTuple):
    """What the backbone hands to an alignment module: one TowerHidden per encoder, None where it did not run.

    Holds all that an aligner needs, so that another one (a frozen copy) can be applied to the same Hidden.
    """

    vision: TowerHidden | None
    text: TowerHidden | None


@dataclass
class DualEncoderOutput(ModelOutput):
    """Output of DualEncoder.forward."""

    image_embeds: Tensor | None = None
    """(B, D) fp32, unit norm; without normalize as it leaves the head, in its dtype."""
    text_embeds: Tensor | None = None
    """(B, D), likewise."""
    image_tokens: Tensor | None = None
    """(B, T, D) fp32, unit norm, with return_tokens: the image's patches (and class token), each through the head."""
    text_tokens: Tensor | None = None
    """(B, T, D) fp32, unit norm, with return_tokens."""
    text_mask: Tensor | None = None
    """(B, T), with return_tokens: 1 for a token of the text, 0 for padding."""
    temperature: Tensor | None = None
    """τ: fp32 (1,), with a gradient where it is learned."""
    learned: tuple[Tensor, ...] | None = None
    """fp32, what the objective learns itself, where it does."""
    hidden: Hidden | None = None
    """The backbone's output, with return_hidden."""

    @property
    def logits_per_image(self) -> Tensor | None:
        """(images, texts): cosine / τ, of which softmax over the texts classifies an image. None where a side did not run."""
        if self.image_embeds is None or self.text_embeds is None:
            return None
        assert self.temperature is not None
        return self.image_embeds @ self.text_embeds.T / self.temperature

    @property
    def logits_per_text(self) -> Tensor | None:
        """(texts, images): the same, transposed."""
        logits = self.logits_per_image
        return None if logits is None else logits.T


class Backbone(nn.Module):
    """φ: both encoders without their tops. Children `vision` and `text` are transformers models."""

    def __init__(
        self, vision: nn.Module, text: nn.Module, layouts: dict[str, towers.Layout], text_padding: int | None = None
    ):
        super().__init__()
        self.vision, self.text = vision, text
        self.layouts, self.text_padding = layouts, text_padding

    def forward(self, pixel_values: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None) -> Hidden:
        vision = text = None
        if pixel_values is not None:
            images = encoders.image_inputs(self.vision.config, pixel_values)
            vision = towers.run(self.vision, self.layouts["vision"], None, **images)
        if input_ids is not None:
            mask = _mask(input_ids, attention_mask)
            if self.text_padding is None:
                text = towers.run(self.text, self.layouts["text"], mask, input_ids=input_ids, attention_mask=mask)
            else:
                ids = input_ids.masked_fill(mask == 0, self.text_padding)
                config: Any = self.text.config
                room = config.max_position_embeddings - ids.shape[1]
                ids = F.pad(ids, (0, room), value=self.text_padding)
                text = towers.run(self.text, self.layouts["text"], None, input_ids=ids)
        return Hidden(vision, text)


class Aligner(nn.Module):
    """θ: Hidden → embeddings as they leave the heads, not normalised; owns the temperature and what the objective learns."""

    def __init__(self, vision: TowerAligner, text: TowerAligner, temperature: Temperature, learned: Learned | None):
        super().__init__()
        self.vision, self.text, self.temperature, self.learned = vision, text, temperature, learned

    def forward(self, hidden: Hidden, with_tokens: bool = False) -> tuple[Tensor | None, ...]:
        """(image, text), each (B, D); with_tokens also (image tokens, text tokens), each (B, T, D). None: did not run."""
        towers = ((self.vision, hidden.vision), (self.text, hidden.text))
        both = [(None, None) if told is None else tower(told, with_tokens) for tower, told in towers]
        pooled, tokens = zip(*both, strict=True)
        return (*pooled, *tokens) if with_tokens else pooled


class DualEncoder(PreTrainedModel):
    """Backbone and alignment module. Build it with `model.build_model`, or load it with `from_pretrained`."""

    config_class = DualEncoderConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(
        self, config: DualEncoderConfig, vision: PreTrainedModel | None = None, text: PreTrainedModel | None = None
    ):
        super().__init__(config)
        whole = {
            "vision": vision if vision is not None else encoders.new_encoder(config.vision_config, "vision"),
            "text": text if text is not None else encoders.new_encoder(config.text_config, "text"),
        }
        layouts, parts = {}, {}
        for side, encoder in whole.items():
            encoder.config._attn_implementation = encoders.attention_of(
                encoder.config
            )  # a composite config has one for all
            own_batchnorms(encoder)
            layouts[side] = towers.layout_of(encoder, config.num_top_blocks, f"model.{side}")
            _check_unknown(encoder, layouts[side], config.num_top_blocks, side)
            parts[side] = self._tower(side, encoder, towers.split(encoder, layouts[side], config.num_top_blocks))
        self.backbone = Backbone(whole["vision"], whole["text"], layouts, config.text_padding)
        self.aligner = Aligner(
            parts["vision"],
            parts["text"],
            Temperature(config.temperature, config.learnable_temperature),
            Learned(config.learned) if config.learned else None,
        )
        self.post_init()

    def _tower(self, side: str, encoder: PreTrainedModel, top: towers.Top) -> TowerAligner:
        c, dim = self.config, encoders.width(encoder.config, f"model.{side}")
        pooling = getattr(c, f"{side}_pooling")
        pooler = top.pooler if c.use_poolers and pooling != "last" else None
        pooled_without = pooling == "last" or encoder.config.model_type in POOLED_WITHOUT_POOLER
        if c.use_poolers and pooler is None and not pooled_without:
            raise ValueError(f"model.pretrained: its {side} encoder ({encoder.config.model_type}) has no pooler")
        return TowerAligner(
            top.blocks,
            top.norm,
            pooler,
            Head(dim, c.embedding_dim, c.head_kind, c.head_hidden_dim, c.head_norm, c.head_output_norm, c.head_bias),
            dim=dim,
            heads=encoders.num_heads(encoder.config, dim),
            num_extra_blocks=c.num_extra_blocks,
            pooling=pooling,
        )

    def _init_weights(self, module: nn.Module) -> None:
        # Encoders initialise what they own; this is called for what is outside of them.
        for side in SIDES:
            if any(module is m for block in getattr(self.aligner, side).blocks for m in block.modules()):
                getattr(self.backbone, side)._init_weights(module)
                return
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, ExtraBlock, Temperature, Learned)):
            module.reset_parameters()

    def encode(
        self, pixel_values: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None = None
    ) -> Hidden:
        """The backbone alone. pixel_values (B, C, S, S), input_ids and attention_mask (B, T); either may be None."""
        return self.backbone(pixel_values, input_ids, attention_mask)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freeze_backbone: bool = False,
        return_hidden: bool = False,
        return_tokens: bool = False,
        normalize: bool = True,
    ) -> DualEncoderOutput:
        """Embed images (B, C, S, S) and texts (B, T).

        freeze_backbone runs the backbone without gradient and in eval mode: then one backbone pass serves the client
        and, with return_hidden, the anchor of equation (2).
        """
        with _frozen(self.backbone) if freeze_backbone else contextlib.nullcontext():
            hidden = self.encode(pixel_values, input_ids, attention_mask)
        image, text, *tokens = self.aligner(hidden, return_tokens)
        if normalize:
            image, text = _unit(image), _unit(text)
        tokens = [_unit(x) for x in tokens]
        text_tokens = text_mask = None
        if tokens and input_ids is not None:
            assert tokens[1] is not None
            text_tokens, text_mask = tokens[1][:, : input_ids.shape[1]], _mask(input_ids, attention_mask)
        return DualEncoderOutput(
            image_embeds=image,
            text_embeds=text,
            image_tokens=tokens[0] if tokens else None,
            text_tokens=text_tokens,
            text_mask=text_mask,
            temperature=self.aligner.temperature(),
            learned=self.aligner.learned() if self.aligner.learned is not None else None,
            hidden=hidden if return_hidden else None,
        )

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The embeddings of images (B, C, S, S) as `pooler_output` (B, D): as they leave the head, not normalised."""
        return BaseModelOutputWithPooling(pooler_output=self.aligner(self.encode(pixel_values, None))[0])

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """The embeddings of texts (B, T) as `pooler_output` (B, D): as they leave the head, not normalised."""
        return BaseModelOutputWithPooling(pooler_output=self.aligner(self.encode(None, input_ids, attention_mask))[1])

    def decay_parameter_names(self) -> list[str]:
        """Names of the parameters that take weight decay: all but biases, norms and the temperature."""
        out = []
        for path, module in self.named_modules():
            if "norm" in type(module).__name__.lower():
                continue
            for name, parameter in module.named_parameters(recurse=False):
                # ZeRO-3 leaves empty parameters behind, with their shape in ds_shape.
                if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.endswith("bias"):
                    out.append(f"{path}.{name}")
        return out

    def matrix_parameter_names(self) -> list[str]:
        """Names of the matrices that map hidden states to hidden states: not embeddings, and not the projection heads."""
        return [
            f"{path}.weight"
            for path, module in self.named_modules()
            if isinstance(module, nn.Linear) and not path.startswith(("aligner.vision.head.", "aligner.text.head."))
        ]

    def encoder_with_batchnorm(self) -> str | None:
        """The key of the encoder that has batchnorms, such as a ResNet; None where none has."""
        for side in SIDES:
            if any(isinstance(m, BatchNorm) for m in getattr(self.backbone, side).modules()):
                return f"model.{side}"
        return None

    def whole_encoder(self, side: str) -> nn.Module:
        """A copy of the `vision` or `text` encoder with its own blocks and norm put back."""
        aligner = getattr(self.aligner, side)
        norm = None if isinstance(aligner.norm, nn.Identity) else aligner.norm
        top = towers.Top(list(aligner.blocks), norm, aligner.pooler)
        return towers.merge(getattr(self.backbone, side), self.backbone.layouts[side], top)


# Encoders whose pooler_output is the (normed) token that our pooling takes.
POOLED_WITHOUT_POOLER = frozenset({"clip_vision_model", "clip_text_model", "dinov2"})


def _check_unknown(encoder: PreTrainedModel, layout: towers.Layout, num_top_blocks: int, side: str) -> None:
    """Try an encoder whose type no test covers: cut, or whole. Skipped on the meta device and for giants."""
    kind, key = encoder.config.model_type, f"model.{side}"
    small = encoders.count_parameters(encoder) <= _MAX_CHECKED_PARAMETERS
    if kind in towers.TESTED_TYPES | towers.WHOLE_TYPES or encoder.device.type == "meta" or not small:
        return
    if recording() is not None:
        raise CannotDefer(f"a {kind} encoder has to be tried")
    inputs = encoders.probe_inputs(encoder.config, side)
    if layout.blocks is None:
        towers.check_whole(encoder, layout, encoders.width(encoder.config, key), inputs, key)
    elif 0 <= num_top_blocks < len(list(encoder.get_submodule(layout.blocks).children())):
        towers.check_cut(encoder, layout, num_top_blocks, inputs, key)


def _unit(x: Tensor | None) -> Tensor | None:
    """(…, D) in fp32, of unit norm."""
    return None if x is None else F.normalize(x.float(), dim=-1)


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Any:
    """No gradient, and eval mode (no dropout); the mode is put back afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
