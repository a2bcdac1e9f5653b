"""The operations that make a model's weights, and the weights that follow from them, one at a time (deferred.py).

Each storage is a node, and a tensor a window on it. A complete overwrite (a draw, a fill, a copy) begins a new node:
what an initialiser throws away is never computed, but for the draws, which the generator's state depends on.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only


class CannotDefer(Exception):
    """A model's construction does something whose result cannot be had later; it must be built with its weights."""


@dataclass(eq=False)
class Node:
    """One storage from a complete overwrite to the next: what was in it before does not matter."""

    num_bytes: int
    read: Callable[[], Tensor] | None = (
        None  # where its first content comes from: a file; else the first writer makes it
    )
    writers: list[int] = field(default_factory=list)  # operations, in order


@dataclass(frozen=True)
class Window:
    """A tensor as a window on a node."""

    node: Node
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def onto(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Operation:
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[
        tuple[int, Window], ...
    ]  # (which of the outputs, flattened; its window) for those with a new storage
    written: tuple[Node, ...]
    draws: bool  # from torch's default generator
    seeded: Tensor | None  # state of a generator of its own


class Tape:
    """The operations of a construction, and the values that follow from them."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._draws: list[int] = []  # operations that draw from the default generator
        self._states = [
            torch.get_rng_state()
        ]  # before the draw of the same index; one more than draws were carried out

    # ---- writing
    def append(self, operation: Operation) -> None:
        index = len(self._operations)
        self._operations.append(operation)
        if operation.draws:
            self._draws.append(index)
        for node in {*operation.written, *(window.node for _, window in operation.outputs)}:
            node.writers.append(index)

    # ---- reading
    def value(self, window: Window) -> Tensor:
        """A tensor as it is at the end of the tape. Shares memory with nothing that is kept."""
        return window.onto(self._content(window.node, len(self._operations)))

    def last_draw(self, node: Node) -> int:
        """Position on the tape of the last draw that a node takes directly, -1 without any."""
        return max((index for index in node.writers if self._operations[index].draws), default=-1)

    def end_state(self) -> Tensor:
        """State of the default generator after all draws."""
        return self._state(len(self._draws))

    def _content(self, node: Node, before: int) -> torch.UntypedStorage:
        storage = None if node.read is None else node.read().contiguous().untyped_storage()
        for index in node.writers[: bisect.bisect_left(node.writers, before)]:
            storage = self._run(index, node, storage)
        assert storage is not None, "a tensor is used before it is made"
        return storage

    def _run(self, index: int, node: Node, storage: torch.UntypedStorage | None) -> torch.UntypedStorage:
        """Carry out one operation that writes to `node`, whose content so far is `storage`."""
        operation = self._operations[index]
        contents: dict[Node, torch.UntypedStorage] = {} if storage is None else {node: storage}

        def real(window: Window) -> Tensor:
            if window.node not in contents:
                blank = window.node.read is None and window.node.writers[0] == index  # this operation fills it
                contents[window.node] = (
                    torch.UntypedStorage(window.node.num_bytes) if blank else self._content(window.node, index)
                )
            return window.onto(contents[window.node])

        args, kwargs = tree_map_only(Window, real, (operation.args, operation.kwargs))
        state = operation.seeded
        if operation.draws:
            state = self._state(bisect.bisect_left(self._draws, index))
        with torch.no_grad(), _generator_at(state) as after:
            out = operation.call(*args, **kwargs)
        if operation.draws and bisect.bisect_left(self._draws, index) == len(self._states) - 1:
            self._states.append(after[0])
        leaves = tree_flatten(out)[0]
        for position, window in operation.outputs:
            if window.node is node:
                made = leaves[position]
                if made.stride() != window.stride or made.storage_offset() != window.offset:
                    made = torch.empty_strided(window.size, window.stride, dtype=window.dtype).copy_(made)
                return made.untyped_storage()
        return contents[node]

    def _state(self, draw: int) -> Tensor:
        """State of the default generator before a draw, given by its index among the draws."""
        while len(self._states) <= draw:
            index = self._draws[len(self._states) - 1]
            operation = self._operations[index]
            node = operation.outputs[0][1].node if operation.outputs else operation.written[0]
            first = node.read is None and node.writers[0] == index
            self._run(index, node, None if first else self._content(node, index))
        return self._states[draw]


@contextmanager
def _generator_at(state: Tensor | None) -> Iterator[list[Tensor]]:
    """The default CPU generator set to `state` for a while; the list gets its state at the end."""
    after: list[Tensor] = []
    if state is None:
        yield after
        return
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield after
        after.append(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
