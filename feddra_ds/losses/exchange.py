"""The loss over a group of ranks: each rank's images meet the texts of all of them, and nobody else's.

A rank computes its own rows of S, one B × (W·B) panel; what its columns lack is merged from the other ranks. So each
entry of S is computed once in the group, forward and backward.
    Gather  every rank holds all texts (W·B × D); the text gradients come home by a reduce-scatter.
    Ring    texts travel round the ring, their column statistics and gradients with them; never more than two
            ranks' texts are held.
Both hide the transfer behind a block's arithmetic. The ranks call forward and backward alike, or they wait for each
other until the group's timeout.

Shape letters: B pairs on each rank, W ranks, D embedding dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from feddra_ds.distributed.collectives import (
    Group,
    RingShift,
    all_max,
    all_sum,
    group_rank,
    group_size,
    start_gather,
    start_reduce_scatter,
)
from feddra_ds.losses.chunked import empty_stat, merge
from feddra_ds.losses.core import Columns, Spec
from feddra_ds.losses.types import Kind


def merge_over_ranks(stat: Tensor, kind: Kind, group: Group) -> Tensor:
    """The statistics of all ranks' rows from each rank's."""
    if kind == "siglip":
        return all_sum(stat, group)
    top = all_max(stat, group)
    top = top.masked_fill(top == -torch.inf, 0)  # no entries at all
    return top + all_sum((stat - top).exp(), group).log()


class Gather:
    """All texts on every rank."""

    def __init__(self, group: Group):
        self.group: Group = group

    def _others(self, rows: int) -> list[slice]:
        """The columns of the ranks before and after this one."""
        rank, size = group_rank(self.group), group_size(self.group)
        return [s for s in (slice(0, rank * rows), slice((rank + 1) * rows, size * rows)) if s.stop > s.start]

    def stats(
        self, spec: Spec, x: Tensor, rx: Tensor, own: Columns, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        ry_all, ry_work = start_gather(own.ry, self.group)
        y_all, y_work = start_gather(own.y, self.group)
        ids_all = None
        if own.ids is not None:
            ids_all, ids_work = start_gather(own.ids, self.group)
            ids_work.wait()
        rows, rank = len(x), group_rank(self.group)
        mine = slice(rank * rows, (rank + 1) * rows)
        same = spec.same(own.ids, own.ids)
        row, own_col, diag = spec.tiles.block_stats(x, own.y, rx, own.ry, scale, bias, True, spec.kind, same)
        ry_work.wait()
        y_work.wait()
        col_all = own_col.new_empty((*own_col.shape[:-1], len(ry_all)))
        col_all[..., mine] = own_col
        for k in self._others(rows):
            same = spec.same(own.ids, None if ids_all is None else ids_all[k])
            block = spec.tiles.block_stats(x, y_all[k], rx, ry_all[k], scale, bias, False, spec.kind, same)
            row, col_all[..., k] = merge(row, block[0], spec.kind), block[1]
        col_all = merge_over_ranks(col_all, spec.kind, self.group)
        return row, col_all[..., mine].clone(), diag, (y_all, ry_all) if ids_all is None else (y_all, ry_all, ids_all)

    def grads(
        self,
        spec: Spec,
        x: Tensor,
        rx: Tensor,
        own: Columns,
        row: Tensor,
        col: Tensor,
        row_coef: Tensor,
        col_coef: Tensor,
        diagonal: Tensor,
        scale: Tensor,
        bias: Tensor,
        kept: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y_all, ry_all, *ids = kept
        per_column, work = start_gather(torch.cat([col.reshape(-1, len(x)), col_coef[None]]).T, self.group)
        work.wait()
        *col_rows, col_coef_all = per_column.T.contiguous()
        col_all = col_rows[0] if col.ndim == 1 else torch.stack(col_rows)
        du = torch.zeros(x.shape, dtype=rx.dtype, device=x.device)
        dv_all = torch.zeros(y_all.shape, dtype=rx.dtype, device=x.device)
        sums = torch.zeros(2, dtype=rx.dtype, device=x.device)
        for k in self._others(len(x)):
            columns = (y_all[k], rx, ry_all[k], row, col_all[..., k], row_coef, col_coef_all[k])
            same = spec.same(own.ids, ids[0][k] if ids else None)
            sums += torch.stack(spec.tiles.block_grads(x, *columns, scale, bias, None, spec.kind, du, dv_all[k], same))
        dv, work = start_reduce_scatter(dv_all, self.group)  # what the other ranks' rows give to these columns
        dv_own = torch.zeros_like(du)
        columns = (own.y, rx, own.ry, row, col, row_coef, col_coef)
        same = spec.same(own.ids, own.ids)
        sums += torch.stack(spec.tiles.block_grads(x, *columns, scale, bias, diagonal, spec.kind, du, dv_own, same))
        work.wait()
        return du, dv.add_(dv_own), sums[0], sums[1]


class Ring:
    """Texts travel; memory does not grow with the ranks."""

    def __init__(self, group: Group):
        self.group: Group = group

    def stats(
        self, spec: Spec, x: Tensor, rx: Tensor, own: Columns, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        y, ry, ids = own.y.detach(), own.ry, [] if own.ids is None else [own.ids]
        positive = spec.duplicates == "positive"
        row, diag = empty_stat(rx, spec.kind, positive), torch.zeros_like(rx)
        col = empty_stat(ry, spec.kind, positive)
        size = group_size(self.group)
        for step in range(size):
            ahead = RingShift([y, ry, *ids], self.group) if step < size - 1 else None
            same = spec.same(own.ids, ids[0] if ids else None)
            block = spec.tiles.block_stats(x, y, rx, ry, scale, bias, step == 0, spec.kind, same)
            row = merge(row, block[0], spec.kind)
            if step == 0:
                diag = block[2]
            (col,) = RingShift([merge(col, block[1], spec.kind)], self.group).wait()
            if ahead is not None:
                y, ry, *ids = ahead.wait()
        return row, col, diag, ()  # after W shifts the columns' statistics are home

    def grads(
        self,
        spec: Spec,
        x: Tensor,
        rx: Tensor,
        own: Columns,
        row: Tensor,
        col: Tensor,
        row_coef: Tensor,
        col_coef: Tensor,
        diagonal: Tensor,
        scale: Tensor,
        bias: Tensor,
        kept: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, ids = own.y.detach(), [] if own.ids is None else [own.ids]
        per_column = torch.cat([own.ry[None], col.reshape(-1, len(x)), col_coef[None]])
        du = torch.zeros(x.shape, dtype=rx.dtype, device=x.device)
        sums = torch.zeros(2, dtype=rx.dtype, device=x.device)
        arriving: RingShift | None = None
        size = group_size(self.group)
        for step in range(size):
            ahead = RingShift([y, per_column, *ids], self.group) if step < size - 1 else None
            ry, col_k, col_coef_k = per_column[0], per_column[1:-1].reshape(col.shape), per_column[-1]
            dv = torch.zeros_like(du)
            on_diagonal = diagonal if step == 0 else None
            block = (x, y, rx, ry, row, col_k, row_coef, col_coef_k, scale, bias, on_diagonal, spec.kind)
            same = spec.same(own.ids, ids[0] if ids else None)
            sums += torch.stack(spec.tiles.block_grads(*block, du, dv, same))
            if arriving is not None:
                dv += arriving.wait()[0]
            arriving = RingShift([dv], self.group)
            if ahead is not None:
                y, per_column, *ids = ahead.wait()
        assert arriving is not None
        return du, arriving.wait()[0], sums[0], sums[1]
