"""The tile loop in PyTorch: any device, O(B) memory beyond a constant tile, float32 or float64 arithmetic.

A *block* is M rows x against N columns y; over a group the columns come from other ranks, and only the block of a
rank's own columns has the diagonal. With u, v the normalised rows, S = scale · u vᵀ (scale = 1/τ), a block gives, over
its entries *off* the diagonal,
    ita      row_j = logsumexp_k S_jk,            col_k = logsumexp_j S_jk            merged by logaddexp
    siglip   row_j = Σ_k softplus(S_jk + b),      col_k = Σ_j the same                merged by addition
and the diagonal S_jj apart: core.py joins them, so that a small loss is not the difference of two large numbers. From
the upstream coefficients r_j, c_k of the losses of row j and column k, G_jk = ∂L/∂S_jk is, off the diagonal,
    ita      r_j exp(S_jk − R_j) + c_k exp(S_jk − C_k)      with R, C the logsumexp over all entries
    siglip   (r_j + c_k) σ(S_jk + b)
and given on it. A block adds up du = G v, dv = Gᵀ u, Σ G S and Σ G.

Where equal reports are not negatives (`Same`), their entries off the diagonal leave row and col, and G is 0 there. Where
they are positives, row and col are (2, M) and (2, N): the others' logsumexp, and below it that of the equal reports. With
P the logsumexp over a row's positives, the diagonal and all, G is there
    r_j (exp(S_jk − R_j) − exp(S_jk − P_j)) = −r_j (1 − exp(P_j − R_j)) exp(S_jk − P_j)      and columns likewise,
for which R over P comes back to block_grads as the two rows of `row`, and C over P as those of `col`.

Shape letters: M rows, N columns, D embedding dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from feddra_ds.losses.reference import EPS
from feddra_ds.losses.types import Kind, Same

TILE_ROWS = 512
TILE_COLUMNS = 2048
MAX_EXPONENT = 40.0  # sums and products of exp(±40) stay normal float32 numbers


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for every other floating dtype."""
    return torch.promote_types(x.dtype, torch.float32)


def row_norms(x: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reciprocal norms (M,) of the rows of `x` (M, D), and their distances (M,) to `anchor`, mean_d (u − u_g)²."""
    dtype = compute_dtype(x)
    inverse = torch.empty(len(x), dtype=dtype, device=x.device)
    distance = torch.zeros_like(inverse)
    for s in _slices(len(x), TILE_ROWS):
        rows = x[s].to(dtype)
        inverse[s] = 1 / rows.norm(dim=1).clamp_min(EPS)
        if anchor is not None:
            distance[s] = (rows * inverse[s, None] - F.normalize(anchor[s].to(dtype), dim=1, eps=EPS)).square().mean(1)
    return inverse, distance


def block_stats(
    x: Tensor,
    y: Tensor,
    rx: Tensor,
    ry: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: bool,
    kind: Kind,
    same: Same | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row (M,), col (N,), S_jj (M,)) of a block; `rx`, `ry` are reciprocal norms. S_jj is 0 without `diagonal`."""
    positive = same is not None and same.positive
    all_rows, all_cols, diag = empty_stat(rx, kind, positive), empty_stat(ry, kind, positive), torch.zeros_like(rx)
    row, col = (all_rows[0], all_cols[0]) if positive else (all_rows, all_cols)
    plain = _exponentials_are_safe(scale, rx)
    for i in _slices(len(x), TILE_ROWS):
        u = _scaled(x, rx, i) * scale
        for k in _slices(len(y), TILE_COLUMNS):
            s = u @ _scaled(y, ry, k).T
            if diagonal:
                on_diagonal = _tile_diagonal(s, i, k)
                _diagonal_of(diag, i, k).copy_(on_diagonal)
                on_diagonal.fill_(-torch.inf)  # no entry, for either kind
            if same is not None:
                equal = same.rows[i, None] == same.columns[None, k]
                if positive:
                    own = s.masked_fill(~equal, -torch.inf)
                    all_rows[1, i] = torch.logaddexp(all_rows[1, i], own.logsumexp(1))
                    all_cols[1, k] = torch.logaddexp(all_cols[1, k], own.logsumexp(0))
                s.masked_fill_(equal, -torch.inf)
            if kind == "siglip":
                s = F.softplus(s.add_(bias), threshold=60)  # its default of 20 drops digits of float64
                row[i] += s.sum(1)
                col[k] += s.sum(0)
            elif plain:
                s.exp_()
                row[i] = torch.logaddexp(row[i], s.sum(1).log_())
                col[k] = torch.logaddexp(col[k], s.sum(0).log_())
            else:
                row[i] = torch.logaddexp(row[i], s.logsumexp(1))
                col[k] = torch.logaddexp(col[k], s.logsumexp(0))
    return all_rows, all_cols, diag


def block_grads(
    x: Tensor,
    y: Tensor,
    rx: Tensor,
    ry: Tensor,
    row: Tensor,
    col: Tensor,
    row_coef: Tensor,
    col_coef: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: Tensor | None,
    kind: Kind,
    du: Tensor,
    dv: Tensor,
    same: Same | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds G v to `du` (M, D) and Gᵀ u to `dv` (N, D) of a block; gives (Σ G S, Σ G).

    `row` (M,), `col` (N,) are the logsumexps over *all* columns and rows of the batch, not only this block's (without
    meaning for siglip); `diagonal` is G_jj (M,) where the block has the diagonal.
    """
    sum_gs, sum_g = torch.zeros_like(scale), torch.zeros_like(scale)
    plain = _exponentials_are_safe(scale, rx)
    if same is not None and same.positive:
        (row, own_row), (col, own_col) = row, col
        own_row_coef, own_col_coef = row_coef * (own_row - row).expm1(), col_coef * (own_col - col).expm1()
    if kind == "ita" and plain:
        row_factor, col_factor = row_coef * (-row).exp(), col_coef * (-col).exp()
    for i in _slices(len(x), TILE_ROWS):
        u = _scaled(x, rx, i)
        for k in _slices(len(y), TILE_COLUMNS):
            v = _scaled(y, ry, k)
            s = (u @ v.T).mul_(scale)
            if kind == "siglip":
                g = torch.sigmoid(s + bias).mul_(row_coef[i, None] + col_coef[None, k])
            elif plain:
                g = s.exp().mul_(row_factor[i, None] + col_factor[None, k])
            else:
                g = (s - row[i, None]).exp_().mul_(row_coef[i, None])
                g.add_((s - col[None, k]).exp_().mul_(col_coef[None, k]))
            if same is not None:
                equal = same.rows[i, None] == same.columns[None, k]
                if same.positive:
                    own = (s - own_row[i, None]).exp_().mul_(own_row_coef[i, None])
                    own.add_((s - own_col[None, k]).exp_().mul_(own_col_coef[None, k]))
                    g = torch.where(equal, own, g)
                else:
                    g.masked_fill_(equal, 0)
            if diagonal is not None:
                _tile_diagonal(g, i, k).copy_(_diagonal_of(diagonal, i, k))
            if kind == "siglip":
                sum_g += g.sum()
            sum_gs += torch.dot(g.view(-1), s.view(-1))
            du[i].addmm_(g, v)
            dv[k].addmm_(g.T, u)
    return sum_gs, sum_g


def finish_grads(
    x: Tensor, rx: Tensor, anchor: Tensor | None, du: Tensor, scale: Tensor, anchor_coef: Tensor
) -> Tensor:
    """∂L/∂x in the dtype of `x`, from `du` (M, D) = Σ G v (overwritten) and the anchor term's coefficients (M,)."""
    out = du if du.dtype == x.dtype else torch.empty_like(x)
    for s in _slices(len(x), TILE_ROWS):
        u = _scaled(x, rx, s)
        grad = du[s].mul_(scale)
        if anchor is not None:
            target = F.normalize(anchor[s].to(u.dtype), dim=1, eps=EPS)
            grad.add_((u - target).mul_(2 / x.shape[1] * anchor_coef[s, None]))
        grad.sub_(u * (grad * u).sum(1, keepdim=True)).mul_(rx[s, None])
        out[s] = grad
    return out


def empty_stat(like: Tensor, kind: Kind, positive: bool = False) -> Tensor:
    """The statistic of no entries, (M,), or (2, M) for `positive`: what `merge` leaves the other one with."""
    shape = (2, len(like)) if positive else (len(like),)
    return like.new_full(shape, -torch.inf if kind == "ita" else 0.0)


def merge(a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    """The statistic of two disjoint sets of entries from each one's."""
    return torch.logaddexp(a, b) if kind == "ita" else a + b


def _exponentials_are_safe(scale: Tensor, like: Tensor) -> bool:
    """|S| ≤ scale: where exp(±scale) is an ordinary number, one exp(S) serves rows and columns, with no maxima.

    Reads a number off the device; on a GPU the maxima are cheaper than that wait.
    """
    limit = MAX_EXPONENT if like.dtype == torch.float32 else 8 * MAX_EXPONENT
    return like.device.type == "cpu" and float(scale) <= limit


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _scaled(x: Tensor, factor: Tensor, rows: slice) -> Tensor:
    return x[rows].to(factor.dtype) * factor[rows, None]


def _tile_diagonal(tile: Tensor, i: slice, k: slice) -> Tensor:
    """View of the entries of a tile (rows i, columns k) that lie on the block's diagonal; may be empty."""
    start, stop = max(i.start, k.start), min(i.stop, k.stop)
    if stop <= start:
        return tile.new_empty(0)
    return tile[start - i.start : stop - i.start, start - k.start : stop - k.start].diagonal()


def _diagonal_of(vector: Tensor, i: slice, k: slice) -> Tensor:
    start, stop = max(i.start, k.start), min(i.stop, k.stop)
    return vector[start : max(start, stop)]
