"""Which implementation runs: `auto` picks once per kind of device, says which, and falls back with one warning."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from feddra_ds.losses import chunked
from feddra_ds.losses.types import Duplicates, Impl

logger = logging.getLogger(__name__)
MAX_TRITON_DIM = 2048


def resolve_impl(impl: Impl, image: Tensor, duplicates: Duplicates = "negative") -> Impl:
    """The implementation for tensors like `image` (B, D). Raises ValueError where `impl` cannot take them."""
    if duplicates != "negative":
        if impl == "triton":
            raise ValueError(f"impl='triton' knows duplicates='negative' only, not {duplicates!r}; use impl='chunked'")
        return "chunked" if impl == "auto" else impl
    if impl == "auto":
        return _auto(image.device.type, image.dtype, image.shape[1] <= MAX_TRITON_DIM)
    if impl == "triton":
        problem = _triton_limit(image.dtype, image.shape[1] <= MAX_TRITON_DIM)
        if problem:
            raise ValueError(f"impl='triton' {problem}; use impl='chunked'")
        from feddra_ds.losses.triton_launch import INTERPRETED

        if image.device.type not in (("cpu", "cuda", "meta") if INTERPRETED else ("cuda", "meta")):
            raise ValueError(
                f"impl='triton' runs on CUDA, not on {image.device.type} (TRITON_INTERPRET=1 runs it on the CPU, "
                "slowly); use impl='chunked' or 'auto'"
            )
    return impl


def _triton_limit(dtype: torch.dtype, fits: bool) -> str:
    if not fits:
        return f"takes embeddings of at most {MAX_TRITON_DIM} dimensions"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    return ""


@functools.cache
def _auto(device: str, dtype: torch.dtype, fits: bool) -> Impl:
    if device != "cuda":
        logger.info("loss on %s: chunked", device)
        return "chunked"
    problem = _triton_limit(dtype, fits) or _triton_failure()
    if problem:
        logger.warning("loss on cuda: chunked, because triton %s", problem)
        return "chunked"
    logger.info("loss on cuda, %s: triton", dtype)
    return "triton"


@functools.cache
def _triton_failure() -> str:
    """Why the kernels do not run here, found by running them on a tiny batch; empty when they do."""
    try:
        from feddra_ds.losses import triton_launch

        smoke_test(triton_launch, "cuda")
    except Exception as error:  # whatever a compiler or driver may raise: the loss still has to run
        return f"failed here: {type(error).__name__}: {error}"
    return ""


def smoke_test(tiles: Any, device: str) -> None:
    """Runs every kernel on a tiny batch. Raises RuntimeError where the result is wrong, or what the compiler raises."""
    x = torch.linspace(-9, 9, 6 * 17, device=device).sin().reshape(6, 17)
    scale, bias = torch.full((), 5.0, device=device), torch.zeros((), device=device)
    gradients = []
    for t in (chunked, tiles):
        rx, _ = t.row_norms(x, None)
        row, col, _ = t.block_stats(x, x, rx, rx, scale, bias, True, "ita")
        du, dv = torch.zeros_like(x), torch.zeros_like(x)
        t.block_grads(x, x, rx, rx, row, col, rx, rx, scale, bias, -rx, "ita", du, dv)
        gradients.append(t.finish_grads(x, rx, None, du, scale, rx))
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    if not error < 1e-2:
        raise RuntimeError(f"the gradient of a small batch is off by {error:.2g}")
