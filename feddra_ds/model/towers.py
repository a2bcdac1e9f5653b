"""Cutting a transformers encoder into what stays in the backbone and what the alignment module takes.

The cut is generic: the encoder's own forward runs with the top blocks replaced by `Tap`s, which record what each of
them would have been called with. `BlockCalls` holds that, and `call_blocks` applies the blocks to it later. Nothing
about masks or position encodings has to be known here, and with the blocks put back (`merge`) the encoder is whole.

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
     "clip_text_model", "siglip_text_model", "modernbert", "mpnet"}
)  # fmt: skip
# Modules that may be listed after the blocks but are used before them.
_INPUT_SIDE = re.compile(r"relative|rel_|position|embed|rotary|rope", re.IGNORECASE)


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
    """Where the parts of an encoder are: dotted module names, None where it has no such part."""

    blocks: str
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
    """Stands where a pooler was."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


def call_blocks(blocks: Sequence[nn.Module], states: Tensor, calls: Sequence[BlockCall]) -> Tensor:
    """`blocks` applied to `states` (B, T, H), each with its recorded arguments."""
    assert len(blocks) == len(calls), "the hidden states come from a model with another number of top blocks"
    for block, call in zip(blocks, calls, strict=True):
        out = block(states, *call.args, **dict(call.kwargs))
        states = out[0] if isinstance(out, tuple) else out
    return states


def _blocks(encoder: nn.Module, path: str) -> list[nn.Module]:
    return list(encoder.get_submodule(path).children())


def find_layout(encoder: nn.Module, key: str) -> Layout:
    """Locate blocks, final norm and pooler of a transformers encoder.

    Raises ValueError naming `key` where the encoder has no single list of blocks, or something unknown after it.
    """
    config: Any = encoder.config
    kind = f"a {config.model_type} encoder ({type(encoder).__name__})"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{key}: {kind} has a decoder too; give an encoder-only model")
    count = getattr(config, "num_hidden_layers", None)
    lists = [n for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1 or len({id(block) for block in _blocks(encoder, lists[0])}) != count:
        raise ValueError(f"{key}: {kind} has no list of its {count} blocks to cut; use a ViT- or BERT-like one")
    path = lists[0].split(".")
    found: dict[str, str | None] = {"norm": None, "pooler": None}
    for depth in range(len(path)):
        parent = encoder.get_submodule(".".join(path[:depth]))
        names = [name for name, _ in parent.named_children()]
        for name in names[names.index(path[depth]) + 1 :]:
            child = parent.get_submodule(name)
            if not any(True for _ in child.parameters()) or _INPUT_SIDE.search(name):
                continue
            if re.search("pool|head", name + type(child).__name__, re.IGNORECASE):
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
    if not 0 <= num_top_blocks < len(blocks):
        raise ValueError(
            f"{key}: {num_top_blocks} top blocks of a {encoder.config.model_type} encoder with {len(blocks)} blocks; "  # type: ignore[union-attr]
            f"at least one must stay in the backbone, so give at most {len(blocks) - 1}"
        )
    kept = len(blocks) - num_top_blocks
    encoder.set_submodule(layout.blocks, nn.ModuleList([*blocks[:kept], *(Tap(b) for b in blocks[kept:])]))
    norm = pooler = None
    if layout.norm:
        norm = encoder.get_submodule(layout.norm)
        encoder.set_submodule(layout.norm, nn.Identity())
    if layout.pooler:
        pooler = encoder.get_submodule(layout.pooler)
        encoder.set_submodule(layout.pooler, Nothing())
    return Top(blocks[kept:], norm, pooler)


def merge(encoder: nn.Module, layout: Layout, top: Top) -> nn.Module:
    """A copy of a cut encoder with its parts put back (a dropped pooler stays dropped)."""
    whole, top = copy.deepcopy((encoder, top))
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
        return TowerHidden(out.last_hidden_state, mask, ())
    records = [tap.take() for tap in taps]
    return TowerHidden(records[0][0], mask, tuple(call for _, call in records))


@torch.no_grad()
def check_cut(encoder: nn.Module, layout: Layout, num_top_blocks: int, inputs: dict[str, Tensor], key: str) -> None:
    """Compare a cut copy of an encoder of a type that no test covers with the encoder itself, on `inputs`.

    Raises ValueError naming `key` where they differ. Draws no random numbers.
    """
    whole = copy.deepcopy(encoder).eval()
    message = f"{key}: cutting a {encoder.config.model_type} encoder changes what it computes; use another encoder"  # type: ignore[union-attr]
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
