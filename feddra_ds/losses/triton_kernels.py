"""The tile loops as Triton kernels; chunked.py's header has the mathematics, triton_launch.py the launches.

Embeddings are read as they are (bfloat16, float16, float32) and multiplied with float32 accumulation; the products
are scaled by 1/‖x‖, 1/‖y‖ and 1/τ afterwards, so normalising rounds nothing. Nothing is summed with atomics: for one
configuration the bits are the same every time.

|S| ≤ scale = 1/τ. Where exp(±scale) is an ordinary float32 (FAST), one exponential exp(S) serves rows and columns and
no maxima are kept; else each keeps its own. Both variants are launched, and the one that the temperature
on the device does not call for returns at once: nobody waits for the device.

EVEN: tiles divide D. FULL: tiles divide M (R) and N, so nothing is masked.

Shape letters: M rows, N columns, D dimensions, R rows of a panel, P row programs, Q column splits.
"""

# mypy: disable-error-code="no-untyped-def"
# Nested ifs: a compile-time condition outside prunes the inner one, joined by `and` it would not.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

FAST_LIMIT = tl.constexpr(40.0)


@triton.jit
def _rows_of(M, D, BR: tl.constexpr, BD: tl.constexpr):
    """Of a program with BR rows: their numbers, those that exist, offsets (BR, BD) of their entries, which exist."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    return rows, rows < M, rows.to(tl.int64)[:, None] * D + d[None, :], (rows < M)[:, None] & (d < D)[None, :]


@triton.jit
def _unit_rows(x, EPS: tl.constexpr):
    """1/‖x‖ of the rows of x (BR, BD)."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    return 1.0 / tl.where(norm < EPS, EPS, norm)  # not tl.maximum: that one drops a NaN


@triton.jit
def row_norms_kernel(
    x, anchor, inverse, distance, M, D,
    EPS: tl.constexpr, HAS_ANCHOR: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """1/‖x‖, and mean_d (u − u_anchor)² where there are anchors."""
    rows, row_ok, at, ok = _rows_of(M, D, BR, BD)
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    scale = _unit_rows(value, EPS)
    tl.store(inverse + rows, scale, mask=row_ok)
    if HAS_ANCHOR:
        other = tl.load(anchor + at, mask=ok, other=0.0).to(tl.float32)
        difference = value * scale[:, None] - other * _unit_rows(other, EPS)[:, None]
        tl.store(distance + rows, tl.sum(difference * difference, 1) / D, mask=row_ok)


@triton.jit
def normalize_kernel(x, inverse, out, M, D, BR: tl.constexpr, BD: tl.constexpr):
    """x/‖x‖ in the dtype of x, an operand of the gradients' products."""
    rows, row_ok, at, ok = _rows_of(M, D, BR, BD)
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    value = value * tl.load(inverse + rows, mask=row_ok, other=0.0)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def finish_kernel(
    x, inverse, anchor, grad, coef, scale_ptr, out, M, D,
    EPS: tl.constexpr, HAS_ANCHOR: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of the normalisation, applied to scale · Σ G v and the anchor term's gradient."""
    rows, row_ok, at, ok = _rows_of(M, D, BR, BD)
    scale = tl.load(inverse + rows, mask=row_ok, other=0.0)
    u = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) * scale[:, None]
    g = tl.load(grad + at, mask=ok, other=0.0) * tl.load(scale_ptr)
    if HAS_ANCHOR:
        other = tl.load(anchor + at, mask=ok, other=0.0).to(tl.float32)
        other = other * _unit_rows(other, EPS)[:, None]
        g += (u - other) * (tl.load(coef + rows, mask=row_ok, other=0.0) * 2.0 / D)[:, None]
    g = (g - u * tl.sum(g * u, 1)[:, None]) * scale[:, None]
    tl.store(out + at, g.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # the interpreter multiplies bfloat16 as if it were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _products(
    x, y, rows, cols, M, N, D, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x[rows] · y[cols]ᵀ (BM, BN) in float32; rows and columns beyond M and N repeat others and are masked later."""
    d = tl.arange(0, BK)
    a = x + (rows % M).to(tl.int64)[:, None] * D + d[None, :]
    b = y + (cols % N).to(tl.int64)[None, :] * D + d[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        if EVEN:
            left, right = tl.load(a + start), tl.load(b + start)
        else:
            left = tl.load(a + start, mask=(d < D - start)[None, :], other=0.0)
            right = tl.load(b + start, mask=(d < D - start)[:, None], other=0.0)
        total = _dot(left, right, total, PRECISION)
    return total


@triton.jit
def _log1p(x):
    # exact for small x ≥ 0, where log(1 + x) would lose x's digits
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def stats_kernel(
    x, y, rx, ry, scale_ptr, bias_ptr, row_out, col_out, diag_out, M, N, D, split_columns,
    DIAGONAL: tl.constexpr, SIGLIP: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (p, q): row blocks p, p + P, … against the q-th part of the columns.

    Row statistics stay in registers and go to row_out (Q, M); column statistics are carried from row block to row
    block in this program's own line of col_out (P, N).
    """
    scale = tl.load(scale_ptr)
    if not SIGLIP:
        if (scale <= FAST_LIMIT) != FAST:
            return
    p, q = tl.program_id(0), tl.program_id(1)
    step = tl.num_programs(0) * BM
    bias = tl.load(bias_ptr)
    for first in range(p * BM, M, step):
        rows = first + tl.arange(0, BM)
        row_scale = tl.load(rx + rows, mask=rows < M, other=0.0) * scale
        top = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        diag = tl.zeros((BM,), dtype=tl.float32)
        for left in range(q * split_columns, tl.minimum((q + 1) * split_columns, N), BN):
            cols = left + tl.arange(0, BN)
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            s = _products(x, y, rows, cols, M, N, D, EVEN, PRECISION, BM, BN, BK)
            s = s * row_scale[:, None] * tl.load(ry + cols, mask=cols < N, other=0.0)[None, :]
            if DIAGONAL:
                if (left < first + BM) & (first < left + BN):
                    on_diagonal = rows[:, None] == cols[None, :]
                    diag += tl.sum(tl.where(on_diagonal, s, 0.0), 1)
                    s = tl.where(on_diagonal, float("-inf"), s)  # no entry, for either kind
            carried = col_out + p.to(tl.int64) * N + cols
            if SIGLIP:
                s += bias
                pair = tl.where(s > 0, s, 0.0) + _log1p(tl.exp(-tl.abs(s)))
                pair = tl.where(s != s, s, pair)
                if not FULL:
                    pair = tl.where(inside, pair, 0.0)
                total += tl.sum(pair, 1)
                column = tl.sum(pair, 0)
                if first >= step:
                    column += tl.load(carried, mask=cols < N, other=0.0)
            elif FAST:
                e = tl.exp(s)
                if not FULL:
                    e = tl.where(inside, e, 0.0)
                total += tl.sum(e, 1)
                column = tl.sum(e, 0)
                if first >= step:
                    column += tl.load(carried, mask=cols < N, other=1.0)
                if first + step >= M:
                    column = tl.log(column)
            else:
                if not FULL:
                    s = tl.where(inside, s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                finite = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(top - finite) + tl.sum(tl.exp(s - finite[:, None]), 1)
                top = higher
                highest = tl.max(s, 0)
                finite_c = tl.where(highest == float("-inf"), 0.0, highest)
                column = finite_c + tl.log(tl.sum(tl.exp(s - finite_c[None, :]), 0))
                if first >= step:
                    before = tl.load(carried, mask=cols < N, other=0.0)
                    larger = tl.maximum(before, column)
                    finite_c = tl.where(larger == float("-inf"), 0.0, larger)
                    column = finite_c + tl.log(tl.exp(before - finite_c) + tl.exp(column - finite_c))
            tl.store(carried, column, mask=cols < N)
        if not SIGLIP:
            total = tl.log(total)
            if not FAST:
                total += tl.where(top == float("-inf"), 0.0, top)
        tl.store(row_out + q.to(tl.int64) * M + rows, total, mask=rows < M)
        if DIAGONAL:
            tl.store(diag_out + q.to(tl.int64) * M + rows, diag, mask=rows < M)
        tl.debug_barrier()  # the next row block reads what other threads of this program wrote


@triton.jit
def _tile_of(program, num_i, num_k, GROUP: tl.constexpr):
    """(i, k) of a program, GROUP row tiles at a time, so that tiles which run together share their operands in L2."""
    group = program // (GROUP * num_k)
    size = tl.minimum(num_i - group * GROUP, GROUP)
    within = program % (GROUP * num_k)
    return group * GROUP + within % size, within // size


@triton.jit
def panel_kernel(
    x, y, rx, ry, row, col, row_coef, col_coef, diagonal, scale_ptr, bias_ptr, gain_ptr, panel, sum_gs, sum_g,
    first_row, R, M, N, D,
    DIAGONAL: tl.constexpr, SIGLIP: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile a program: gain · G of rows first_row … first_row + R into panel (R, N), and its Σ G S and Σ G."""
    scale = tl.load(scale_ptr)
    if not SIGLIP:
        if (scale <= FAST_LIMIT) != FAST:
            return
    program = tl.program_id(0)
    i, k = _tile_of(program, tl.cdiv(R, BM), tl.cdiv(N, BN), GROUP)
    local = i * BM + tl.arange(0, BM)
    rows, cols = first_row + local, k * BN + tl.arange(0, BN)
    row_ok, col_ok = local < R, cols < N
    s = _products(x, y, rows, cols, M, N, D, EVEN, PRECISION, BM, BN, BK)
    s = s * (tl.load(rx + rows, mask=row_ok, other=0.0) * scale)[:, None]
    s = s * tl.load(ry + cols, mask=col_ok, other=0.0)[None, :]
    rc = tl.load(row_coef + rows, mask=row_ok, other=0.0)
    cc = tl.load(col_coef + cols, mask=col_ok, other=0.0)
    if SIGLIP:
        g = (rc[:, None] + cc[None, :]) / (1.0 + tl.exp(-(s + tl.load(bias_ptr))))
    else:
        row_stat = tl.load(row + rows, mask=row_ok, other=0.0)
        col_stat = tl.load(col + cols, mask=col_ok, other=0.0)
        if FAST:
            g = tl.exp(s) * ((rc * tl.exp(-row_stat))[:, None] + (cc * tl.exp(-col_stat))[None, :])
        else:
            g = rc[:, None] * tl.exp(s - row_stat[:, None]) + cc[None, :] * tl.exp(s - col_stat[None, :])
    if DIAGONAL:
        given = tl.load(diagonal + rows, mask=row_ok, other=0.0)
        g = tl.where(rows[:, None] == cols[None, :], given[:, None], g)
    if not FULL:
        g = tl.where(row_ok[:, None] & col_ok[None, :], g, 0.0)
    tl.store(sum_gs + program, tl.sum(tl.sum(tl.where(g == 0.0, 0.0, g * s), 1), 0))
    tl.store(sum_g + program, tl.sum(tl.sum(g, 1), 0))
    target = panel + local.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(target, (g * tl.load(gain_ptr)).to(panel.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def product_kernel(
    a, b, out, gain_ptr, M, N, K, a_m, a_k, b_k, b_n, split_k, split_out,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[z] (M, N) = or += A B / gain over the z-th part of K, float32; a_m … b_n are the operands' strides."""
    i, j = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    z = tl.program_id(1)
    rows, cols, d = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    left = a + (rows % M).to(tl.int64)[:, None] * a_m
    right = b + (cols % N).to(tl.int64)[None, :] * b_n
    stop = tl.minimum((z + 1) * split_k, K)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(z * split_k, stop, BK):
        k = (start + d).to(tl.int64)
        total = _dot(
            tl.load(left + k[None, :] * a_k, mask=(k < stop)[None, :], other=0.0),
            tl.load(right + k[:, None] * b_k, mask=(k < stop)[:, None], other=0.0),
            total,
            PRECISION,
        )
    total = total / tl.load(gain_ptr)
    target = out + z.to(tl.int64) * split_out + rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if ADD:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)
