"""The tile loops on a GPU: chunked.py's functions, as launches of triton_kernels.py.

The backward pass recomputes S a panel of R rows at a time, writes G of that panel once in the inputs' dtype (times a
gain that keeps small entries clear of float16's underflow) and multiplies it with both sides: 4 products in all,
counting the forward one. Memory beyond inputs and gradients: R·N for the panel, P·N for the column statistics, a
normalised copy of the inputs; all linear in the batch.

Shape letters: M rows, N columns, D dimensions, R rows of a panel, P row programs, Q column splits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from feddra_ds.losses import triton_kernels as kernels
from feddra_ds.losses.reference import EPS
from feddra_ds.losses.types import Kind, Same

INTERPRETED = not isinstance(kernels.stats_kernel, triton.runtime.JITFunction)
PANEL_ROWS = 128 if INTERPRETED else 2048
GAIN = 4096.0
SPLIT_COLUMNS = 64 if INTERPRETED else 256  # a multiple of every tile's columns and depth
GROUP = 8


class Config(NamedTuple):
    """A tile's size and how a program runs it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


WIDE = [Config(128, 128, 64, 8, 3), Config(128, 256, 64, 8, 3), Config(64, 128, 64, 4, 4), Config(64, 64, 64, 4, 3)]
FLOAT32 = [Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3), Config(128, 128, 16, 8, 2)]
INTERPRETER = [Config(64, 64, 64, 4, 1)]

_chosen: dict[tuple[Any, ...], Config] = {}


def _tuned(key: tuple[Any, ...], x: Tensor, launch: Callable[[Config], None]) -> Config:
    """The fastest configuration of `launch` for `key`, timed at its first use in this process.

    Under torch.use_deterministic_algorithms nothing is timed and the first that fits is taken, so that bits do not
    depend on a timing; a CUDA graph takes what was found before its capture, or the first.
    """
    candidates = INTERPRETER if INTERPRETED else FLOAT32 if x.dtype == torch.float32 else WIDE
    if len(candidates) == 1:
        return candidates[0]
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = (*key, x.device, x.dtype, deterministic)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times: dict[Config, float] = {}
        for config in candidates:
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                launch(config)
                times[config] = _milliseconds(functools.partial(launch, config))
                if deterministic:
                    break
        assert times, f"no configuration of {key} fits this device"
        _chosen[key] = min(times, key=lambda c: times[c])
    return _chosen[key]


def _milliseconds(run: Callable[[], None], repeats: int = 3) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return min(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _num_sms(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _precision(x: Tensor) -> str:
    """float32 products as torch.set_float32_matmul_precision asks for; 16-bit ones have no choice."""
    if INTERPRETED:
        return "widened"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def _bucket(*sizes: int) -> tuple[int, ...]:
    return tuple(triton.next_power_of_2(size) for size in sizes)


def _row_launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of the kernels that take whole rows."""
    width = max(16, triton.next_power_of_2(x.shape[1]))
    height = max(1, (2**16 if INTERPRETED else 2**11) // width)
    return (triton.cdiv(len(x), height),), {"BR": height, "BD": width, "num_warps": 4}


def row_norms(x: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
    """See chunked.row_norms."""
    x = x.contiguous()
    inverse = torch.empty(len(x), dtype=torch.float32, device=x.device)
    distance = torch.zeros_like(inverse)
    other = x if anchor is None else anchor.contiguous()
    grid, options = _row_launch(x)
    with _on(x):
        kernels.row_norms_kernel[grid](
            x, other, inverse, distance, *x.shape, EPS=EPS, HAS_ANCHOR=anchor is not None, **options
        )
    return inverse, distance


def finish_grads(
    x: Tensor, rx: Tensor, anchor: Tensor | None, du: Tensor, scale: Tensor, anchor_coef: Tensor
) -> Tensor:
    """See chunked.finish_grads."""
    x = x.contiguous()
    out = torch.empty_like(x)
    other = x if anchor is None else anchor.contiguous()
    grid, options = _row_launch(x)
    with _on(x):
        kernels.finish_kernel[grid](
            x, rx, other, du, anchor_coef, scale, out, *x.shape, EPS=EPS, HAS_ANCHOR=anchor is not None, **options
        )
    return out


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
    """See chunked.block_stats; `same` is for chunked alone (dispatch.resolve_impl)."""
    assert same is None
    x, y = x.contiguous(), y.contiguous()
    (m, d), n = x.shape, len(y)
    # One grid for every configuration: programs that find no row block left leave what is here.
    programs = min(triton.cdiv(m, 64), 2 * _num_sms(x))
    splits = max(1, min(2 * _num_sms(x) // programs, triton.cdiv(n, SPLIT_COLUMNS)))
    per_split = triton.cdiv(triton.cdiv(n, splits), SPLIT_COLUMNS) * SPLIT_COLUMNS
    empty = 0.0 if kind == "siglip" else -torch.inf
    row = torch.full((splits, m), empty, device=x.device)
    col = torch.full((programs, n), empty, device=x.device)
    diag = torch.zeros((splits, m), device=x.device)

    def launch(config: Config, fast: bool, scale: Tensor) -> None:
        kernels.stats_kernel[(programs, splits)](
            x, y, rx, ry, scale, bias, row, col, diag, m, n, d, per_split,
            DIAGONAL=diagonal, SIGLIP=kind == "siglip", FAST=fast, **_tile_options(x, m, n, config),
        )  # fmt: skip

    with _on(x):
        variants = _variants(("stats", kind, diagonal, d, *_bucket(m, n)), x, scale, kind, launch)
        for buffer, value in ((row, empty), (col, empty), (diag, 0.0)):
            buffer.fill_(value)  # timing wrote to them
        for config, fast in variants:
            launch(config, fast, scale)
    if kind == "siglip":
        return row.sum(0), col.sum(0), diag.sum(0)
    return row.logsumexp(0), col.logsumexp(0), diag.sum(0)


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
    """See chunked.block_grads; `same` is for chunked alone (dispatch.resolve_impl)."""
    assert same is None
    x, y = x.contiguous(), y.contiguous()
    (m, d), n = x.shape, len(y)
    height = min(PANEL_ROWS, m)
    given = row_coef if diagonal is None else diagonal
    panel = torch.empty((height, n), dtype=x.dtype, device=x.device)
    largest = torch.maximum(row_coef.abs().max(), col_coef.abs().max())
    gain = GAIN / torch.where(largest > 0, largest, GAIN)  # NaN goes on as NaN from the coefficients themselves
    u, v = _normalized(x, rx), _normalized(y, ry)
    tiles = triton.cdiv(height, 32) * triton.cdiv(n, 32)  # at least as many as any configuration has
    sums, total = torch.zeros((2, tiles), device=x.device), torch.zeros(2, device=x.device)

    def launch(config: Config, fast: bool, scale: Tensor, first: int = 0) -> None:
        rows = min(height, m - first)
        grid = (triton.cdiv(rows, config.rows) * triton.cdiv(n, config.columns),)
        kernels.panel_kernel[grid](
            x, y, rx, ry, row, col, row_coef, col_coef, given, scale, bias, gain, panel, *sums, first, rows, m, n, d,
            DIAGONAL=diagonal is not None, SIGLIP=kind == "siglip", FAST=fast, GROUP=GROUP,
            **_tile_options(x, rows, n, config),
        )  # fmt: skip

    with _on(x):
        variants = _variants(("panel", kind, diagonal is not None, d, *_bucket(height, n)), x, scale, kind, launch)
        for first in range(0, m, height):
            sums.zero_()  # timing, or a panel of more rows, wrote to them
            for config, fast in variants:
                launch(config, fast, scale, first)
            total += sums.sum(1)
            rows = slice(first, min(first + height, m))
            g = panel[: rows.stop - first]
            _add_product(g, v, du[rows], gain)
            _add_product(g.T, u[rows], dv, gain)
    return total[0], total[1]


def _variants(
    key: tuple[Any, ...], x: Tensor, scale: Tensor, kind: Kind, launch: Callable[..., None]
) -> list[tuple[Config, bool]]:
    """The configurations to launch, each with FAST or not; of two, the temperature on the device lets one work."""
    chosen = []
    for fast in (True,) if kind == "siglip" else (True, False):
        probe = torch.full_like(scale, 10.0 if fast else 100.0)  # each is timed where it works
        chosen.append((_tuned((*key, fast), x, functools.partial(launch, fast=fast, scale=probe)), fast))
    return chosen


def _tile_options(x: Tensor, rows: int, columns: int, config: Config) -> dict[str, Any]:
    options: dict[str, Any] = {"BM": config.rows, "BN": config.columns, "BK": config.depth, "PRECISION": _precision(x)}
    options["EVEN"] = x.shape[1] % config.depth == 0
    options["FULL"] = rows % config.rows == 0 and columns % config.columns == 0
    return options | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _normalized(x: Tensor, inverse: Tensor) -> Tensor:
    out = torch.empty_like(x)
    grid, options = _row_launch(x)
    with _on(x):
        kernels.normalize_kernel[grid](x, inverse, out, *x.shape, **options)
    return out


def _add_product(a: Tensor, b: Tensor, out: Tensor, gain: Tensor) -> None:
    """out (M, N) += a (M, K) · b (K, N) / gain, in float32; K is split where M × N has too few tiles for the device."""
    (m, k), n = a.shape, b.shape[1]
    tiles = triton.cdiv(m, 128) * triton.cdiv(n, 128)
    splits = max(1, min(2 * _num_sms(out) // tiles, 8, k // SPLIT_COLUMNS))
    per_split = triton.cdiv(triton.cdiv(k, splits), SPLIT_COLUMNS) * SPLIT_COLUMNS
    splits = triton.cdiv(k, per_split)
    parts = out if splits == 1 else torch.empty((splits, m, n), device=out.device)

    def launch(config: Config, target: Tensor, add: bool) -> None:
        kernels.product_kernel[(triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns), splits)](
            a, b, target, gain, m, n, k, *a.stride(), *b.stride(), per_split, m * n,
            ADD=add, PRECISION=_precision(a), GROUP=GROUP, BM=config.rows, BN=config.columns, BK=config.depth,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    key = ("product", a.stride(0) == 1, n, splits, *_bucket(m, k))
    config = _tuned(key, a, lambda c: launch(c, torch.empty((splits, m, n), device=out.device), False))
    launch(config, parts, splits == 1)
    if splits > 1:
        out.add_(parts.sum(0))
