"""The Triton kernels compiled for the GPU that is here: parity with float64, no waits, memory, NCCL.

Run apart from the interpreter's tests: python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from losses_parity import KINDS, Case, all_cases, assert_parity, check_extreme, check_nan, draw, evaluate, train

import feddra_ds.losses
from feddra_ds.losses import dispatch
from feddra_ds.losses.fused import fused_dro_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 16), (41, 33), (257, 130), (1000, 512)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_equals_float64(dtype: torch.dtype, shape: tuple[int, int], kind: str) -> None:
    embeddings = draw(shape, dtype, "cuda")
    for case in all_cases(kind):
        assert_parity(embeddings, case, "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_chunked_equals_float64(dtype: torch.dtype, kind: str) -> None:
    embeddings = draw((1000, 512), dtype, "cuda")
    for case in all_cases(kind):
        assert_parity(embeddings, case, "chunked")


@pytest.mark.parametrize("shape", [(4096, 512), (2048, 2048), (3001, 768)], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_large_shapes_equal_float64(temperature: float, shape: tuple[int, int]) -> None:
    """Several panels, row blocks a program and splits; both variants of the exponentials; fitting tiles and not."""
    case = Case("ita", True, True, True, temperature=temperature)
    assert_parity(draw(shape, torch.bfloat16, "cuda"), case, "triton", 1 if temperature > 0.05 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", ["cold", "tiny norms", "huge norms", "identical rows", "one pair", "one weight"])
def test_extremes_equal_float64(extreme: str, kind: str, dtype: torch.dtype) -> None:
    check_extreme(extreme, kind, dtype, "cuda", "triton")


@pytest.mark.parametrize("where", ["image", "text", "image anchor", "temperature", "weight"])
def test_nan_in_gives_nan_out(where: str) -> None:
    check_nan(where, "cuda", "triton")


def test_auto_takes_triton_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._auto.cache_clear()
    with caplog.at_level(logging.INFO, "feddra_ds"):
        for _ in range(2):
            assert dispatch.resolve_impl("auto", torch.ones(4, 3, device="cuda")) == "triton"
    assert [r.message for r in caplog.records] == ["loss on cuda, torch.float32: triton"]


def test_twice_the_same_bits() -> None:
    embeddings = draw((3001, 768), torch.bfloat16, "cuda")
    case = Case("ita", True, True, True)
    first = evaluate(embeddings, case, "triton")
    for _ in range(3):
        torch.testing.assert_close(evaluate(embeddings, case, "triton"), first, rtol=0, atol=0)


def test_the_host_never_waits() -> None:
    image, text, *anchors = draw((1024, 256), torch.bfloat16, "cuda")
    tau = torch.tensor(0.07, device="cuda", requires_grad=True)
    inputs = (image.requires_grad_(), text.requires_grad_(), tau)

    def step() -> None:
        loss = fused_dro_loss(image, text, *anchors, temperature=tau, anchor_weight=1.0, impl="triton")
        torch.autograd.grad(loss.total, inputs)

    step()  # tunes, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear_in_the_batch() -> None:
    peaks = {}
    for batch in (16384, 32768):
        image, text = (torch.randn(batch, 512, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        for measured in (False, True):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            total = fused_dro_loss(image, text, temperature=0.07, impl="triton").total
            torch.autograd.grad(total, (image, text))
            if measured:
                peaks[batch] = torch.cuda.max_memory_allocated() - before
    assert peaks[32768] <= 2.2 * peaks[16384]
    assert peaks[32768] <= 0.15 * 4 * 32768**2


def test_a_quarter_million_pairs() -> None:
    image, text = (torch.randn(262144, 512, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    loss = fused_dro_loss(image, text, temperature=0.07, impl="triton")
    grads = torch.autograd.grad(loss.total, (image, text))
    assert loss.total.isfinite()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    u, v = (torch.nn.functional.normalize(x.detach().float(), dim=1) for x in (image, text))
    rows = u[:8] @ v.T / 0.07  # a few rows by hand
    cols = v[:8] @ u.T / 0.07
    diagonal = rows.diagonal()
    expected = rows.logsumexp(1) + cols.logsumexp(1) - 2 * diagonal
    torch.testing.assert_close(loss.alignment[:8], expected, rtol=1e-4, atol=1e-3)


def test_inside_a_compiled_step() -> None:
    image, text = (x.requires_grad_() for x in draw((256, 64), torch.bfloat16, "cuda")[:2])

    def step(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return 2 * fused_dro_loss(3 * image, text, temperature=0.07, impl="triton").total

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        total = function(image, text)
        results.append([total, *torch.autograd.grad(total, (image, text))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


def test_training_ends_where_reference_ends() -> None:
    torch.testing.assert_close(train(50, "triton", "cuda"), train(50, "reference", "cuda"), rtol=1e-3, atol=1e-4)


def test_the_group_path_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes one rank a GPU: the group's gathers and reductions, on a group of one that is not taken for none."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        embeddings = draw((300, 64), torch.bfloat16, "cuda")
        case = Case("ita", True, True, True)
        alone = evaluate(embeddings, case, "triton")
        monkeypatch.setattr(feddra_ds.losses.fused, "group_size", lambda group: 2 if group is not None else 1)
        grouped = evaluate(embeddings, case, "triton", group=dist.group.WORLD, exchange="gather")
        torch.testing.assert_close(grouped, alone, rtol=1e-3, atol=1e-5)
    finally:
        dist.destroy_process_group()
