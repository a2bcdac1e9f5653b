"""Cutting a transformers encoder into what stays in the backbone and what the alignment module takes.

The cut is generic: the encoder's own forward runs with the top blocks replaced by `Tap`s, which record what each of
them would have been called with. `BlockCalls` holds that, and `call_blocks` applies the blocks to it later. Nothing
about masks or position encodings has to be known here, and with the blocks put back (`merge`) the encoder is whole.

An encoder whose blocks cannot be called like that (windows that shift, feature maps, biases handed from block to block)
stays whole in the backbone, with `num_top_blocks` 0; the alignment module then begins with the extra blocks.

Legend: B batch, T tokens or patches, H hidden size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Model types whose cut is compared with the plain encoder in the tests; any other is compared when it is built.
TESTED_TYPES = frozenset(
    {"vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model", "bert", "roberta", "distilbert", "electra",
     "clip_text_model", "siglip_text_model", "modernbert", "mpnet", "beit", "siglip2_vision_model",
     "siglip2_text_model"}
)  # fmt: skip
# Model types that stay whole; their states are compared with the plain encoder's in the tests.
WHOLE_TYPES = frozenset(
    {"swin", "swinv2", "convnext", "convnextv2", "resnet", "regnet", "albert", "deberta", "deberta-v2", "t5", "mt5",
     "umt5"}
)  # fmt: skip
# Types of an encoder with a decoder of which transformers has the encoder alone.
ENCODERS_OF_TWO = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# Norms that these apply to their pooled states alone: here they act on every state, before pooling.
_POOLED_NORMS = {"convnext": "layernorm", "convnextv2": "layernorm"}
# Modules that may be listed after the blocks but are used before them.
_INPUT_SIDE = re.compile(r"relative|rel_|position|embed|rotary|rope", re.IGNORECASE)


KEEP_WHOLE = "keep it whole: model.num_top_blocks = 0, with model.num_extra_blocks = 1 or more to train in stage 1"


class BlockCall(NamedTuple):
    """Arguments of one block besides the hidden states: tensors, flags, None."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class TowerHidden(NamedTuple):
    """What an encoder's backbone hands to its part of the alignment module."""

    states: Tensor
    """(B, T, H) hidden states after the last block of the backbone."""
    mask: Tensor | None
    """(B, T) 1 for a token, 0 for padding; None where nothing is padded (images)."""
    calls: tuple[BlockCall, ...]
    """One per top block."""


class Layout(NamedTuple):
    """Where the parts of an encoder are: dotted module names, None where it has no such part, or none to be cut."""

    blocks: str | None
    norm: str | None
    pooler: str | None


class Top(NamedTuple):
    """The parts cut off an encoder, in the order in which they act."""

    blocks: list[nn.Module]
    norm: nn.Module | None
    pooler: nn.Module | None


class Tap(nn.Module):
    """Stands where a top block was: passes the hidden states on and records the call."""

    record: tuple[Tensor, BlockCall] | None = None

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, value in vars(block).items():  # encoders ask their blocks for e.g. `attention_type`
            if not name.startswith("_") and name != "training" and isinstance(value, (str, int, bool)):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.record = (hidden_states, BlockCall(args, tuple(kwargs.items())))
        return hidden_states

    def take(self) -> tuple[Tensor, BlockCall]:
        """The recorded call, forgotten here: no graph outlives the forward that made it."""
        record, self.record = self.record, None
        assert record is not None, "the encoder's forward did not reach this block"
        return record


class Nothing(nn.Module):
    """Stands where a pooler was: gives back the states, which some encoders go on with."""

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states


def call_blocks(blocks: Sequence[nn.Module], states: Tensor, calls: Sequence[BlockCall]) -> Tensor:
    """`blocks` applied to `states` (B, T, H), each with its recorded arguments."""
    assert len(blocks) == len(calls), "the hidden states come from a model with another number of top blocks"
    for block, call in zip(blocks, calls, strict=True):
        out = block(states, *call.args, **dict(call.kwargs))
        states = out[0] if isinstance(out, tuple) else out
    return states


def _blocks(encoder: nn.Module, path: str | None) -> list[nn.Module]:
    return [] if path is None else list(encoder.get_submodule(path).children())


def layout_of(encoder: nn.Module, num_top_blocks: int, key: str) -> Layout:
    """Where to cut an encoder; with 0 top blocks one of a type whose cut is not tested stays whole. Raises ValueError."""
    config: Any = encoder.config
    check_config(config, num_top_blocks, key)
    if num_top_blocks == 0 and config.model_type not in TESTED_TYPES:
        return whole_layout(encoder)
    return find_layout(encoder, key)


def check_config(config: Any, num_top_blocks: int, key: str) -> None:
    """Raises ValueError naming `key` where a config alone, before any weight, says that its encoder does not fit."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) and kind not in ENCODERS_OF_TWO:
        raise ValueError(f"{key}: a {kind} encoder has a decoder too; give an encoder-only model")
    if num_top_blocks and kind in WHOLE_TYPES:
        raise ValueError(f"{key}: a {kind} encoder cannot be cut into blocks; {KEEP_WHOLE}")


def whole_layout(encoder: nn.Module) -> Layout:
    """What leaves an encoder that stays whole: a pooler with weights, and a norm that acts on the pooled states alone."""
    poolers = [
        name
        for name, child in encoder.named_children()
        if re.search("pool|head", name + type(child).__name__, re.IGNORECASE) and _has_weights(child)
    ]
    return Layout(None, _POOLED_NORMS.get(encoder.config.model_type), poolers[-1] if poolers else None)  # type: ignore[union-attr, arg-type]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def find_layout(encoder: nn.Module, key: str) -> Layout:
    """Locate blocks, final norm and pooler of a transformers encoder.

    Raises ValueError naming `key` where the encoder has no single list of blocks, or something unknown after it.
    """
    config: Any = encoder.config
    kind = f"a {config.model_type} encoder ({type(encoder).__name__})"
    count = getattr(config, "num_hidden_layers", None)
    lists = [n for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1 or len({id(block) for block in _blocks(encoder, lists[0])}) != count:
        raise ValueError(f"{key}: {kind} has no list of its {count} blocks to cut; {KEEP_WHOLE}")
    path = lists[0].split(".")
    found: dict[str, str | None] = {"norm": None, "pooler": None}
    for depth in range(len(path)):
        parent = encoder.get_submodule(".".join(path[:depth]))
        names = [name for name, _ in parent.named_children()]
        for name in names[names.index(path[depth]) + 1 :]:
            child = parent.get_submodule(name)
            if not _has_weights(child) or _INPUT_SIDE.search(name):
                continue
            within = [inner for inner, m in child.named_children() if _has_weights(m)]
            if len(within) == 1 and "norm" in within[0].lower():  # BEiT's pooler is a mean and this norm
                part, name = "norm", f"{name}.{within[0]}"
            elif re.search("pool|head", name + type(child).__name__, re.IGNORECASE):
                part = "pooler"
            elif re.search("norm", name + type(child).__name__, re.IGNORECASE):
                part = "norm"
            else:
                raise ValueError(f"{key}: {kind} has an unknown part {name!r} after its blocks, which cannot be moved")
            if found[part] is not None:
                raise ValueError(f"{key}: {kind} has two parts after its blocks that look like a {part}")
            found[part] = ".".join([*path[:depth], name])
    return Layout(lists[0], found["norm"], found["pooler"])


def split(encoder: nn.Module, layout: Layout, num_top_blocks: int, key: str = "model.num_top_blocks") -> Top:
    """Cut the top blocks, the final norm and the pooler off `encoder`, in place.

    Raises ValueError naming `key` unless 0 ≤ num_top_blocks < number of blocks.
    """
    blocks = _blocks(encoder, layout.blocks)
    if layout.blocks is not None:
        if not 0 <= num_top_blocks < len(blocks):
            raise ValueError(
                f"{key}: {num_top_blocks} top blocks of a {encoder.config.model_type} encoder with {len(blocks)} blocks; "  # type: ignore[union-attr]
                f"at least one must stay in the backbone, so give at most {len(blocks) - 1}"
            )
        kept = len(blocks) - num_top_blocks
        taps = nn.ModuleList([*blocks[:kept], *(Tap(b) for b in blocks[kept:])])
        encoder.set_submodule(layout.blocks, taps)
        blocks = blocks[kept:]
    norm = pooler = None
    if layout.norm:
        norm = encoder.get_submodule(layout.norm)
        encoder.set_submodule(layout.norm, nn.Identity())
    if layout.pooler:
        pooler = encoder.get_submodule(layout.pooler)
        encoder.set_submodule(layout.pooler, Nothing())
    return Top(blocks, norm, pooler)


def merge(encoder: nn.Module, layout: Layout, top: Top) -> nn.Module:
    """A copy of a cut encoder with its parts put back (a dropped pooler stays dropped)."""
    whole, top = copy.deepcopy((encoder, top))
    if layout.blocks is not None:
        blocks = [b for b in _blocks(whole, layout.blocks) if not isinstance(b, Tap)]
        whole.set_submodule(layout.blocks, nn.ModuleList([*blocks, *top.blocks]))
    if layout.norm and top.norm is not None:
        whole.set_submodule(layout.norm, top.norm)
    if layout.pooler and top.pooler is not None:
        whole.set_submodule(layout.pooler, top.pooler)
    return whole


def run(encoder: nn.Module, layout: Layout, mask: Tensor | None, **inputs: Tensor) -> TowerHidden:
    """The backbone's part of a cut encoder. `inputs` are the encoder's own, e.g. pixel_values (B, C, S, S)."""
    out = encoder(**inputs, return_dict=True)
    taps = [block for block in _blocks(encoder, layout.blocks) if isinstance(block, Tap)]
    if not taps:
        return TowerHidden(as_sequence(out.last_hidden_state), mask, ())
    records = [tap.take() for tap in taps]
    return TowerHidden(records[0][0], mask, tuple(call for _, call in records))


def as_sequence(states: Tensor) -> Tensor:
    """(B, T, H) as it is; a feature map (B, H, h, w) as (B, h·w, H)."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


@torch.no_grad()
def check_whole(encoder: nn.Module, layout: Layout, width: int, inputs: dict[str, Tensor], key: str) -> None:
    """Try an encoder that stays whole, of a type that no test covers, on `inputs`. Draws no random numbers.

    Raises ValueError naming `key` unless it gives states (B, T, width) or a map of that many channels.
    """
    kind = encoder.config.model_type  # type: ignore[union-attr]
    whole = copy.deepcopy(encoder).eval()
    try:
        split(whole, layout, 0)
        states = run(whole, layout, None, **inputs).states
    except Exception as error:  # what a forward raises on inputs that it does not expect has no common type
        raise ValueError(f"{key}: a {kind} encoder cannot be used: {type(error).__name__}: {error}") from error
    if states.ndim != 3 or states.shape[-1] != width:
        shape = tuple(states.shape)
        raise ValueError(
            f"{key}: a {kind} encoder cannot be used: it gives states of shape {shape}, not (B, T, {width})"
        )


@torch.no_grad()
def check_cut(encoder: nn.Module, layout: Layout, num_top_blocks: int, inputs: dict[str, Tensor], key: str) -> None:
    """Compare a cut copy of an encoder of a type that no test covers with the encoder itself, on `inputs`.

    Raises ValueError naming `key` where they differ. Draws no random numbers.
    """
    whole = copy.deepcopy(encoder).eval()
    message = f"{key}: cutting a {encoder.config.model_type} encoder changes what it computes; {KEEP_WHOLE}"  # type: ignore[union-attr]
    try:
        plain = whole(**inputs, return_dict=True).last_hidden_state
        top = split(whole, layout, num_top_blocks)
        hidden = run(whole, layout, inputs.get("attention_mask"), **inputs)
        states = call_blocks(top.blocks, hidden.states, hidden.calls)
    except Exception as error:  # what a forward raises on inputs that it does not expect has no common type
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from error
    normed = top.norm(states) if top.norm is not None else states
    # Some encoders (CLIP vision) apply their final norm to the pooled token only.
    if not any(o.shape == plain.shape and torch.allclose(o, plain, atol=1e-4, rtol=1e-4) for o in (normed, states)):
        raise ValueError(message)
