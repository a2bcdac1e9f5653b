"""Cases of the Triton kernels under Triton's interpreter; test_losses_triton.py runs them in a process of their own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/unit/losses_triton_cases.py
"""

from __future__ import annotations

import pytest
import torch
from losses_parity import (
    KINDS,
    Case,
    all_cases,
    assert_parity,
    check_extreme,
    check_nan,
    draw,
    evaluate,
    some_cases,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on log 0 and NaN, which a GPU does not mind
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUICK = [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 16), (41, 33)], ids=str)
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_small_shapes_equal_float64(dtype: torch.dtype, shape: tuple[int, int], kind: str) -> None:
    embeddings = draw(shape, dtype)
    for case in some_cases(kind):
        assert_parity(embeddings, case, "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_many_odd_tiles_equal_float64(dtype: torch.dtype, kind: str) -> None:
    """Several row blocks a program, panels, splits of the columns and of K, all with remainders."""
    assert_parity(draw((257, 130), dtype), next(some_cases(kind)), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype: torch.dtype, kind: str) -> None:
    embeddings = draw((41, 33), dtype)
    for case in all_cases(kind):
        assert_parity(embeddings, case, "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_tiles_that_fit_exactly(temperature: float, kind: str) -> None:
    """No masks (FULL, EVEN), and at 0.01 the variant with maxima of its own, over several tiles."""
    embeddings = draw((256, 64), torch.float32)
    assert_parity(
        embeddings, Case(kind, True, True, True, temperature=temperature), "triton", 1 if temperature > 0.05 else 10
    )


def test_cold_over_odd_tiles() -> None:
    assert_parity(draw((141, 33), torch.float32), Case("ita", True, True, True, temperature=0.01), "triton", 10)


@pytest.mark.parametrize("dtype", QUICK[:2], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", ["cold", "tiny norms", "huge norms", "identical rows", "one pair", "one weight"])
def test_extremes_equal_float64(extreme: str, kind: str, dtype: torch.dtype) -> None:
    check_extreme(extreme, kind, dtype, "cpu", "triton")


@pytest.mark.parametrize("where", ["image", "text", "image anchor", "temperature", "weight"])
def test_nan_in_gives_nan_out(where: str) -> None:
    check_nan(where, "cpu", "triton")


def test_half_gradients_survive_a_large_batch() -> None:
    """Entries of G near 1/B² are below float16's smallest number; the panel's gain keeps them."""
    embeddings = draw((300, 16), torch.float16)
    weights = torch.full((300,), 1e-6)
    weights[:150] = 1.0
    assert_parity(embeddings, Case("ita", weights=True), "triton", weights=weights)


def test_twice_the_same_bits() -> None:
    embeddings = draw((141, 33), torch.bfloat16)
    case = Case("ita", True, True, True)
    torch.testing.assert_close(
        evaluate(embeddings, case, "triton"), evaluate(embeddings, case, "triton"), rtol=0, atol=0
    )


def test_training_ends_where_reference_ends() -> None:
    torch.testing.assert_close(train(20, "triton"), train(20, "reference"), rtol=1e-4, atol=1e-5)


def test_the_smoke_test_passes() -> None:
    from feddra_ds.losses import dispatch, triton_launch

    assert triton_launch.INTERPRETED
    dispatch.smoke_test(triton_launch, "cpu")
