"""Muon for matrices and AdamW for the rest, as one optimizer of one learning rate (Jordan et al. 2024; Liu et al. 2502.16982).

Muon replaces a matrix's momentum by the nearest orthogonal matrix (torch's five Newton-Schulz steps, in bfloat16) and scales
it to the root mean square that AdamW's steps have, 0.2 √max(rows, columns), so that both take `optimizer.lr`. Where ZeRO has
cut the matrices into slices, each rank keeps the momentum of its own slice; the ranks of the slot add their parts of a few
matrices at a time into whole ones, and each steps its own part of what is orthogonal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from feddra_ds.engine.masters import Fragment, Slice

COEFFICIENTS, STEPS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7  # torch's, which are Jordan's
BUCKET_ELEMENTS = 2**24  # of whole matrices at a time: 64 MiB, or the largest matrix


class MuonAndAdamW(torch.optim.Optimizer):
    """Steps the groups with `is_muon` by Muon and the others by torch.optim.AdamW.

    The group dicts and the state are shared with AdamW's, so that a learning rate, a master weight or a moment that is
    changed from outside is its as well.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float], eps: float
    ):
        super().__init__(groups, {"lr": lr})
        self.momentum = momentum
        self._slices: dict[int, Slice] = {}
        self._shapes: Mapping[str, Sequence[int]] = {}
        self._slot: dist.ProcessGroup | None = None
        rest = [group for group in self.param_groups if not group["is_muon"]]
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True) if rest else None
        if self._adamw is not None:
            self._adamw.state = self.state

    def lay_out(
        self, slices: Collection[Slice], shapes: Mapping[str, Sequence[int]], slot: dist.ProcessGroup | None
    ) -> None:
        """Say what ZeRO has made of the parameters, before the first step that counts.

        slices: of this rank, whose tensors are the optimizer's parameters. shapes: by parameter. slot: the ranks that hold
        the other slices, over which `step` is collective then; None where there are none.
        """
        self._slices = {one.tensor.data_ptr(): one for one in slices}
        self._shapes, self._slot = shapes, slot

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        """One step of the groups that `param_groups` holds now."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"] if group["is_muon"] else ():
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"])
        rest = [group for group in self.param_groups if not group["is_muon"]]
        if self._adamw is not None and rest:
            self._adamw.param_groups = rest
            self._adamw.step()
        return loss

    def _step(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        """A matrix, or a slice of several."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - self.momentum)
        update = parameter.grad.lerp(buffer, self.momentum)
        moves: Iterator[tuple[Tensor, Tensor, Sequence[int]]]
        if parameter.ndim == 2:
            moves = iter([(parameter, orthogonal(update), parameter.shape)])
        elif parameter.data_ptr() in self._slices:
            moves = self._moves(parameter, update, self._slices[parameter.data_ptr()])
        else:
            return  # DeepSpeed takes a step of zeros while it builds, to have the state made
        parameter.mul_(1 - lr * weight_decay)
        for part, direction, shape in moves:
            part.add_(direction, alpha=-_adjust_lr(lr, "match_rms_adamw", torch.Size(shape)))

    def _moves(self, parameter: Tensor, update: Tensor, one: Slice) -> Iterator[tuple[Tensor, Tensor, Sequence[int]]]:
        """(part of the slice, its part of the orthogonal matrix, the matrix's shape) of each matrix. Collective over the slot."""
        own = {fragment.name: fragment for fragment in one.fragments}
        for names in self._buckets(one.parameters):
            sizes = [torch.Size(self._shapes[name]).numel() for name in names]
            flat = update.new_zeros(sum(sizes))
            whole = dict(zip(names, flat.split(sizes), strict=True))
            for name in own.keys() & whole.keys():
                _of(whole[name], own[name]).copy_(update.narrow(0, own[name].offset, own[name].length))
            if self._slot is not None:
                dist.all_reduce(flat, group=self._slot)
            for name in [name for name in names if name in own]:
                fragment, shape = own[name], self._shapes[name]
                direction = orthogonal(whole[name].view(*shape)).reshape(-1)
                yield parameter.narrow(0, fragment.offset, fragment.length), _of(direction, fragment), shape

    def _buckets(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Names of consecutive matrices that are made whole together, the same on every rank."""
        bucket: list[str] = []
        num_elements = 0
        for name in names:
            size = torch.Size(self._shapes[name]).numel()
            if bucket and num_elements + size > BUCKET_ELEMENTS:
                yield bucket
                bucket, num_elements = [], 0
            bucket.append(name)
            num_elements += size
        if bucket:
            yield bucket


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, about: its singular values are between 0.7 and 1.2. bfloat16."""
    return _zeropower_via_newtonschulz(matrix, COEFFICIENTS, STEPS, EPSILON)


def _of(flat: Tensor, fragment: Fragment) -> Tensor:
    """The fragment's elements of a whole parameter."""
    return flat.narrow(0, fragment.start, fragment.length)
