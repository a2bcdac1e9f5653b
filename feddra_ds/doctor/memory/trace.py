"""What a training step allocates, found by running it on tensors without data.

The model is built on the meta device and run, forward and backward, on fake tensors (shapes and dtypes, no memory), while
every storage that appears and disappears is written down. So activations are not estimated from a formula: they are what
this model's own code saves at this batch, whatever its encoders are. A 1 B model takes seconds.

Legend: b pairs, S side of the image, T tokens, C channels.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from feddra_ds.model.dual_encoder import DualEncoder

Kind = Literal["take", "give", "gradient"]
Pass = Literal["embed", "stage1", "stage2"]


class Event(NamedTuple):
    """take, give: so many bytes in one block are allocated, freed; gradient: a parameter's gradient of so many bytes is ready."""

    kind: Kind
    num_bytes: int


@dataclass(frozen=True)
class Sizes:
    """What the model is given: b pairs of (3, S, S) images and T tokens."""

    pairs: int
    image_size: int
    text_length: int


@dataclass
class StepTracer:
    """Runs a model that was built on the meta device on fake tensors, in `dtype`; the model is changed."""

    model: DualEncoder
    dtype: torch.dtype
    _mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    def __post_init__(self) -> None:
        with self._mode:
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        shape = torch.empty(p.shape, dtype=self.dtype)
                        module._parameters[name] = nn.Parameter(shape, requires_grad=p.requires_grad)
                for name, b in module._buffers.items():
                    if b is not None:
                        dtype = self.dtype if b.is_floating_point() else b.dtype
                        module._buffers[name] = torch.empty(b.shape, dtype=dtype)

    def run(self, what: Pass, sizes: Sizes, *, anchors: bool = True) -> list[Event]:
        """The events of one pass over a (micro-)batch, in order; afterwards all is freed again, gradients handed over.

        embed: a forward without graph, as for anchors and evaluation. stage1: the backbone without graph, the alignment
        module with it (and, with `anchors`, its frozen copy on the same backbone output), backward. stage2: forward and
        backward of everything.
        """
        events: list[Event] = []
        with self._mode, _quiet():
            pixels = torch.empty(sizes.pairs, 3, sizes.image_size, sizes.image_size, dtype=torch.uint8)
            shift = torch.empty(3, 1, 1)
            ids = torch.zeros(sizes.pairs, sizes.text_length, dtype=torch.int64)
            self.model.train(what != "embed")
            with _Watch(self.model, events) as watch, self._collected(events):
                self._pass(what, pixels, shift, ids, anchors)
            watch.close()
        return events

    def _pass(self, what: Pass, pixels: Tensor, shift: Tensor, ids: Tensor, anchors: bool) -> None:
        inputs = {
            "pixel_values": pixels.float().mul_(1 / 255).sub_(shift).div_(shift).to(self.dtype),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        if what == "embed":
            with torch.no_grad():
                self.model(**inputs)
            return
        out = self.model(**inputs, freeze_backbone=what == "stage1", return_hidden=True)
        if what == "stage1" and anchors:
            with torch.no_grad():
                self.model.aligner(out.hidden)
        loss = out.image_embeds.sum() + out.text_embeds.sum()
        if isinstance(out.temperature, Tensor):
            loss = loss + out.temperature.sum()
        for x in out.learned or ():
            loss = loss + x.sum()
        loss.backward()

    @contextlib.contextmanager
    def _collected(self, events: list[Event]) -> Iterator[None]:
        """Take each gradient off its parameter as it is done, as ZeRO does, and write it down."""

        def hand_over(parameter: Tensor) -> None:
            assert parameter.grad is not None
            num_bytes = parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None
            events.append(Event("gradient", num_bytes))

        trained = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(hand_over) for p in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Watch(TorchDispatchMode):
    """Writes down every storage that an operator makes, and when it is freed; those of the model itself are left out."""

    def __init__(self, model: nn.Module, events: list[Event]):
        super().__init__()
        self._events: list[Event] | None = events
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def close(self) -> None:
        """Ignore what is freed from now on: the pass is over."""
        self._events = None

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._write("take", size)
        weakref.finalize(storage, self._write, "give", size)

    def _write(self, kind: Kind, size: int) -> None:
        if self._events is not None:
            self._events.append(Event(kind, size))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of torch's fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
