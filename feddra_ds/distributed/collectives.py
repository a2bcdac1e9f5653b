"""Collectives over an explicit group. `group=None` means no process group: one process, never WORLD.

Shape letters: B rows on this rank, W ranks of the group.
Every wait is bounded by the timeout that its group was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def group_size(group: Group | None) -> int:
    """Ranks of `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group | None) -> int:
    """This process's rank in `group`; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_sum(x: Tensor, group: Group | None) -> Tensor:
    """Sum of `x` over the group, a new tensor, equal on every rank. No gradient."""
    x = x.detach().clone()
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def all_max(x: Tensor, group: Group | None) -> Tensor:
    """Elementwise maximum of `x` over the group, a new tensor. A NaN on one rank may be lost. No gradient."""
    x = x.detach().clone()
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def gather_ints(values: Sequence[int], group: Group | None, device: torch.device) -> list[list[int]]:
    """`values` of every rank, by rank (same length everywhere). Waits for the device."""
    mine = torch.tensor(list(values), dtype=torch.int64, device=device)
    return _stack(mine, group).tolist()


def first_text(text: str | None, group: Group | None, device: torch.device) -> str | None:
    """The text of the first rank that has one, equal on every rank; None where none has. Waits for the device."""
    data = (text or "").encode()
    longest = max(length for (length,) in gather_ints([len(data)], group, device))
    if not longest:
        return None
    rows = gather_ints([*data, *[0] * (longest - len(data))], group, device)
    return next(told for row in rows if (told := bytes(row).rstrip(b"\0").decode()))


def require_equal_shapes(x: Tensor, group: Group | None, what: str) -> None:
    """Raises ValueError, on every rank alike, when the ranks' two-dimensional `x` differ in shape."""
    if group_size(group) == 1:
        return
    shapes = gather_ints(x.shape, group, x.device)
    if any(s != shapes[0] for s in shapes):
        listed = ", ".join(f"rank {r}: {tuple(s)}" for r, s in enumerate(shapes))
        raise ValueError(f"{what}: every rank of the group needs the same shape, but they are {listed}")


def _stack(x: Tensor, group: Group | None) -> Tensor:
    """(W, *x.shape): `x` of every rank (same shape everywhere), without gradient."""
    x = x.detach().contiguous()
    if group is None:
        return x.unsqueeze(0).clone()
    out = x.new_empty((group_size(group), *x.shape))
    dist.all_gather_into_tensor(out.view(-1), x.view(-1), group=group)
    return out


def start_gather(x: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Begin gathering `x` (B, …) of every rank: the (W·B, …) tensor, filled once `.wait()` of the second returns."""
    x = x.detach().contiguous()
    out = x.new_empty((group_size(group) * x.shape[0], *x.shape[1:]))
    return out, dist.all_gather_into_tensor(out, x, group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Begin summing `x` (W·B, …) over the ranks: this rank's (B, …) of it, once `.wait()` of the second returns."""
    size = group_size(group)
    assert x.shape[0] % size == 0, (x.shape, size)
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, backward: str) -> Tensor:
        ctx.group, ctx.mode, ctx.rows = group, backward, x.shape[0]
        return _stack(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        if ctx.mode == "sum":
            mine, work = start_reduce_scatter(grad, ctx.group)
            work.wait()
        else:
            start = group_rank(ctx.group) * ctx.rows
            mine = grad[start : start + ctx.rows].clone()
        return mine, None, None


def gather(x: Tensor, group: Group | None, backward: Literal["slice", "sum"]) -> Tensor:
    """`x` (B, …) of every rank, stacked by rank to (W·B, …), differentiable; the same shape on every rank.

    What `x` receives: with "slice" this rank's rows of its own gradient (right when every rank computes the same full
    loss); with "sum" those rows summed over the ranks (right when the ranks' losses are parts of a sum). A collective
    runs in the backward pass with "sum".
    """
    if group is None:
        return x
    return _Gather.apply(x, group, backward)


def gather_uneven(x: Tensor, group: Group | None) -> Tensor:
    """`x` (B_r, …) of every rank, concatenated by rank; B_r may differ and be 0. No gradient."""
    x = x.detach()
    if group is None:
        return x
    rows = [r for (r,) in gather_ints([x.shape[0]], group, x.device)]
    padded = x.new_zeros((max(rows), *x.shape[1:]))
    padded[: x.shape[0]] = x
    return torch.cat([part[:n] for part, n in zip(_stack(padded, group), rows, strict=True)])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself; its gradient is multiplied by `factor` (a rank's 1/W share of a replicated parameter, say)."""
    return _ScaleGradient.apply(x, factor)


class RingShift:
    """Tensors on their way to the next rank of the ring; `wait` gives those that came from the previous rank.

    Shapes and dtypes must be equal on every rank. The tensors sent must not change before `wait` returns.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group):
        size, rank = group_size(group), group_rank(group)
        after = dist.get_global_rank(group, (rank + 1) % size)
        before = dist.get_global_rank(group, (rank - 1) % size)
        self._sent = [t.detach().contiguous() for t in tensors]
        self._received = [torch.empty_like(t) for t in self._sent]
        steps = []
        for sent, received in zip(self._sent, self._received, strict=True):
            steps.append(dist.P2POp(dist.isend, sent, after, group))
            steps.append(dist.P2POp(dist.irecv, received, before, group))
        self._works = dist.batch_isend_irecv(steps)

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._received
