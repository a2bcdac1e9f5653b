"""The loss in one process: parity with float64, extremes, refusals, torch.compile and meta tensors."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses_parity import (
    KINDS,
    Case,
    all_cases,
    assert_parity,
    check_extreme,
    check_nan,
    draw,
    draw_ids,
    evaluate,
    some_cases,
    train,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from feddra_ds.losses import chunked, dispatch, ops
from feddra_ds.losses.fused import fused_dro_loss
from feddra_ds.losses.reference import alignment_per_pair, normalize, reference_loss

SHAPES = [(8, 16), (41, 33), (257, 130)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that divide nothing, so that small batches cross them in both directions."""
    monkeypatch.setattr(chunked, "TILE_ROWS", 17)
    monkeypatch.setattr(chunked, "TILE_COLUMNS", 11)


# The specification itself, against formulas written otherwise.


def test_reference_is_two_cross_entropies_and_the_anchor_distances() -> None:
    image, text, image_anchor, text_anchor = draw((13, 7), torch.float64)
    loss = reference_loss(image, text, image_anchor, text_anchor, None, 0.07, anchor_weight=0.3)
    logits = torch.cosine_similarity(image[:, None], text[None, :], dim=2) / 0.07
    labels = torch.arange(13)
    alignment = F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")
    anchor = sum(
        (2 - 2 * torch.cosine_similarity(a, b)) / 7 for a, b in ((image, image_anchor), (text, text_anchor))
    )  # ‖u − w‖² of unit vectors
    torch.testing.assert_close(loss.alignment, alignment)
    torch.testing.assert_close(loss.anchor, anchor)
    torch.testing.assert_close(loss.per_sample, alignment + 0.3 * anchor)
    torch.testing.assert_close(loss.total, (alignment + 0.3 * anchor).mean())


def test_reference_siglip_is_the_papers() -> None:
    image, text, *_ = draw((9, 5), torch.float64)
    loss = reference_loss(image, text, None, None, None, 0.1, -2.0, direction_reduction="mean", kind="siglip")
    logits = normalize(image) @ normalize(text).T / 0.1 - 2.0
    labels = 2 * torch.eye(9, dtype=torch.float64) - 1
    torch.testing.assert_close(loss.total, -F.logsigmoid(labels * logits).sum() / 9)


def test_weights_pick_and_scale_does_not_matter() -> None:
    embeddings = draw((6, 5), torch.float64)[:2]
    loss = fused_dro_loss(*embeddings, temperature=0.1, sample_weight=torch.tensor([0, 0, 8.0, 0, 0, 0]))
    torch.testing.assert_close(loss.total, loss.per_sample[2])


# Parity.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunked_equals_float64(
    dtype: torch.dtype, shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    embeddings = draw(shape, dtype)
    for case in all_cases(kind) if shape[0] < 100 else some_cases(kind):
        assert_parity(embeddings, case, "chunked")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_equals_float64_over_its_own_tiles(dtype: torch.dtype, kind: str) -> None:
    embeddings = draw((1000, 512), dtype)
    for case in list(some_cases(kind))[:2]:
        assert_parity(embeddings, case, "chunked")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(257, 130), (1000, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunked_equals_float64_in_every_combination(dtype: torch.dtype, shape: tuple[int, int], kind: str) -> None:
    embeddings = draw(shape, dtype)
    for case in all_cases(kind):
        assert_parity(embeddings, case, "chunked")


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_chunked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_ROWS", 2)
    monkeypatch.setattr(chunked, "TILE_COLUMNS", 3)
    image, text, *anchors = draw((5, 4), torch.float64)
    weights = torch.tensor([0.3, 0.0, 2.0, 1.0, 0.7], dtype=torch.float64)

    def total(image: torch.Tensor, text: torch.Tensor, tau: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {"bias": bias} if kind == "siglip" else {}
        return fused_dro_loss(
            image, text, *anchors, temperature=tau, anchor_weight=0.7, sample_weight=weights, impl="chunked", kind=kind,
            **options,
        ).total  # fmt: skip

    scalars = [torch.tensor(value, dtype=torch.float64) for value in (0.2, -1.0)]
    inputs = [x.requires_grad_() for x in (image, text, *scalars)]
    inputs[3].requires_grad_(kind == "siglip")
    assert torch.autograd.gradcheck(total, inputs)


# Extremes.

EXTREMES = ["cold", "tiny norms", "huge norms", "identical rows", "one pair", "one weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_equal_float64(extreme: str, kind: str, dtype: torch.dtype) -> None:
    check_extreme(extreme, kind, dtype, "cpu", "chunked")


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("where", ["image", "text", "image anchor", "temperature", "weight"])
def test_nan_in_gives_nan_out(where: str, impl: str) -> None:
    check_nan(where, "cpu", impl)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_does_not_reach_the_arithmetic(impl: str) -> None:
    image, text, *_ = draw((33, 16), torch.float32)
    plain = fused_dro_loss(image, text, temperature=0.07, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused_dro_loss(image, text, temperature=0.07, impl=impl)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_autocast_does_not_reach_the_backward_pass() -> None:
    embeddings = draw((33, 16), torch.float32)
    plain = evaluate(embeddings, Case(learnable=True), "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = evaluate(embeddings, Case(learnable=True), "chunked")
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_inputs_of_two_dtypes_and_strided_ones() -> None:
    image, text, *_ = draw((20, 12), torch.float32)
    mixed = fused_dro_loss(image.bfloat16(), text, temperature=0.1).total
    torch.testing.assert_close(mixed, fused_dro_loss(image.bfloat16().float(), text, temperature=0.1).total)
    wide = torch.cat([image, text], 1)
    strided = fused_dro_loss(wide[:, :12], wide[:, 12:], temperature=0.1).total
    torch.testing.assert_close(strided, fused_dro_loss(image, text, temperature=0.1).total)


class _LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_grows_with_the_square_of_the_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    embeddings = draw((512, 8), torch.float32)
    largest = {}
    for impl in ("chunked", "reference"):
        with _LargestTensor() as mode:
            evaluate(embeddings, Case(kind, anchors=True, learnable=True), impl)
        largest[impl] = mode.bytes
    assert largest["reference"] >= 4 * 512 * 512  # the mode sees what it should
    assert largest["chunked"] <= 8 * 512 * 8  # the float64 inputs of the comparison, at most


def test_training_ends_where_reference_ends() -> None:
    expected = train(50, "reference")
    torch.testing.assert_close(train(50, "chunked"), expected, rtol=1e-4, atol=1e-5)
    assert (expected - train(0, "reference")).norm() > 0.1  # something was learned


# Pairs with the same report.
IDS = torch.tensor([0, 1, 0, 2, 2, 0])


def by_hand(logits: Tensor, ids: Tensor, duplicates: str) -> Tensor:
    """Image → text of equation (1), pair by pair."""
    out = []
    for j in range(len(ids)):
        equal = [k for k in range(len(ids)) if ids[k] == ids[j]]
        positives = equal if duplicates == "positive" else [j]
        left_out = [k for k in equal if k != j] if duplicates == "ignore" else []
        summed = [k for k in range(len(ids)) if k not in left_out]
        out.append(-(logits[j, positives].exp().sum() / logits[j, summed].exp().sum()).log())
    return torch.stack(out)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("duplicates", ["negative", "positive", "ignore"])
def test_the_same_report_is_what_the_formulas_say(duplicates: str, impl: str) -> None:
    image, text, *_ = (x.requires_grad_() for x in draw((6, 5), torch.float64))
    logits = normalize(image) @ normalize(text).T / 0.07
    expected = by_hand(logits, IDS, duplicates) + by_hand(logits.T, IDS, duplicates)
    wanted = torch.autograd.grad(expected.mean(), (image, text))
    options = {"text_ids": IDS, "duplicates": duplicates, "impl": impl}
    loss = fused_dro_loss(image, text, temperature=0.07, **options)
    torch.testing.assert_close(loss.alignment, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(loss.total, (image, text)), wanted)
    found = alignment_per_pair(image, text, IDS, 0.07, duplicates=duplicates)
    torch.testing.assert_close(found, expected.detach())  # L_i counts them as training does


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("duplicates", ["positive", "ignore"])
def test_chunked_knows_the_same_report_across_its_tiles(
    duplicates: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    embeddings = draw((41, 33), dtype)
    for temperature, factor in ((0.07, 1), (0.01, 10)):
        case = Case(anchors=True, weights=True, learnable=True, temperature=temperature, duplicates=duplicates)
        assert_parity(embeddings, case, "chunked", factor, text_ids=draw_ids(41))


@pytest.mark.parametrize("duplicates", ["positive", "ignore"])
def test_a_batch_of_one_report_teaches_nothing(duplicates: str) -> None:
    image, text, *_ = (x.requires_grad_() for x in draw((7, 5), torch.float32))
    loss = fused_dro_loss(image, text, temperature=0.07, text_ids=torch.zeros(7).long(), duplicates=duplicates)
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert torch.equal(image.grad, torch.zeros(7, 5))
    assert torch.equal(text.grad, torch.zeros(7, 5))


def test_alignment_per_pair() -> None:
    image, text, *_ = draw((12, 6), torch.float64)
    distinct = alignment_per_pair(image, text, torch.arange(12), 0.07)
    torch.testing.assert_close(distinct, fused_dro_loss(image, text, temperature=0.07).alignment)
    mean = alignment_per_pair(image, text, torch.arange(12), 0.07, "mean")
    torch.testing.assert_close(mean, distinct / 2)
    ids = torch.arange(12) // 3
    perfect = torch.eye(4, dtype=torch.float64)[ids]
    for duplicates in ("positive", "ignore"):
        assert alignment_per_pair(perfect, perfect, ids, 0.01, duplicates=duplicates).abs().max() < 1e-12
    assert alignment_per_pair(perfect, perfect, ids, 0.01).min() > 2  # 2 log 3
    with pytest.raises(ValueError, match="one id for each of the 12 pairs"):
        alignment_per_pair(image, text, ids[:-1], 0.07)


# Refusals.

U = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((U, U[:3]), {}, r"both be \(B, D\), not \(4, 3\) and \(3, 3\)"),
        ((U[:0], U[:0]), {}, r"both be \(B, D\)"),
        ((U.long(), U.long()), {}, "must be floating"),
        ((U, U, U), {}, "both or neither"),
        ((U, U, U, U[:3]), {}, r"text_anchor must be a constant of shape \(4, 3\)"),
        ((U, U, U.clone().requires_grad_(), U), {}, "image_anchor must be a constant"),
        ((U, U, U, U), {"anchor_weight": -1.0}, "anchor_weight must be finite and ≥ 0"),
        ((U, U), {"anchor_weight": 1.0}, "there are no anchors"),
        ((U, U), {"sample_weight": torch.ones(3)}, r"sample_weight must be a constant of shape \(4,\)"),
        ((U, U), {"sample_weight": torch.zeros(4)}, "they sum to 0"),
        ((U, U), {"sample_weight": torch.zeros(4), "impl": "reference"}, "they sum to 0"),
        ((U, U), {"sample_weight": torch.tensor([1.0, -1, -1, 3])}, "2 of them are negative"),
        ((U, U), {"bias": 1.0}, "bias is for kind='siglip'"),
        ((U, U), {"temperature": 0.0}, "temperature must be finite and > 0"),
        ((U, U), {"temperature": math.nan}, "temperature must be finite and > 0"),
        ((U, U), {"temperature": torch.ones(2)}, "temperature must have one floating element"),
        ((U, U), {"bias": torch.ones(1).long(), "kind": "siglip"}, "bias must have one floating element"),
        ((U, U), {"kind": "clip"}, "kind must be one of ita, siglip, not 'clip'"),
        ((U, U), {"impl": "cuda"}, "impl must be one of"),
        ((U, U), {"direction_reduction": "max"}, "direction_reduction must be one of sum, mean"),
        ((U, U), {"direction_reduction": (1.5, -0.5)}, r"or two weights ≥ 0, not \(1.5, -0.5\)"),
        ((U, U), {"exchange": "mesh"}, "exchange must be one of"),
        ((U, U), {"duplicates": "twice", "text_ids": torch.arange(4)}, "duplicates must be one of"),
        ((U, U), {"duplicates": "positive"}, "duplicates='positive' needs text_ids"),
        ((U, U), {"duplicates": "ignore", "text_ids": torch.arange(3)}, "one id for each of the 4 pairs"),
        (
            (U, U),
            {"duplicates": "ignore", "text_ids": torch.arange(4), "kind": "siglip"},
            "duplicates='ignore' is for kind='ita'",
        ),
        (
            (U, U),
            {"duplicates": "ignore", "text_ids": torch.arange(4), "impl": "triton"},
            "impl='triton' knows duplicates='negative' only",
        ),
        ((U.double(), U.double()), {"impl": "triton"}, "takes float32, bfloat16 and float16, not torch.float64"),
        ((torch.ones(4, 2049), torch.ones(4, 2049)), {"impl": "triton"}, "at most 2048 dimensions"),
    ],
)
def test_refusals_say_what_is_wrong(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_dro_loss(*arguments, **{"temperature": 0.07, **options})


# Which implementation runs.


def test_auto_is_chunked_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._auto.cache_clear()
    with caplog.at_level(logging.INFO, "feddra_ds"):
        for _ in range(3):
            assert dispatch.resolve_impl("auto", U) == "chunked"
    assert [r.message for r in caplog.records] == ["loss on cpu: chunked"]


def test_auto_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_failure", lambda: "failed here: ImportError: no triton")
    dispatch._auto.cache_clear()
    with caplog.at_level(logging.INFO, "feddra_ds"):
        for _ in range(3):
            assert dispatch._auto("cuda", torch.float32, True) == "chunked"
    dispatch._auto.cache_clear()
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "loss on cuda: chunked, because triton failed here: ImportError: no triton")
    ]


def test_the_smoke_test_finds_a_wrong_kernel() -> None:
    dispatch.smoke_test(chunked, "cpu")
    wrong = SimpleNamespace(**{**vars(chunked), "finish_grads": lambda *a: 1.1 * chunked.finish_grads(*a)})
    with pytest.raises(RuntimeError, match=r"off by 0\.1"):
        dispatch.smoke_test(wrong, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here triton runs")
def test_without_a_gpu_triton_is_refused_and_found_not_to_run() -> None:
    code = (
        "import sys, torch; from feddra_ds.losses import dispatch, fused_dro_loss; u = torch.ones(4, 3)\n"
        "assert not {'triton', 'deepspeed', 'torch._dynamo'} & set(sys.modules)\n"
        "fused_dro_loss(u, u, temperature=0.1); assert 'triton' not in sys.modules\n"
        "assert dispatch._triton_failure()\n"
        "fused_dro_loss(u, u, temperature=0.1, impl='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "impl='triton' runs on CUDA, not on cpu" in done.stderr.splitlines()[-1]


# torch.compile and meta tensors.


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_pass_torchs_own_checks(kind: str) -> None:
    image, text, *anchors = draw((6, 4), torch.float32)
    tau, bias = torch.tensor([0.1], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    inputs = (
        image.requires_grad_(),
        text.requires_grad_(),
        *anchors,
        torch.rand(6),
        tau,
        bias,
        0.7,
        0.75,
        0.25,
        kind,
        "chunked",
    )
    torch.library.opcheck(ops.dro_loss, inputs)


def test_compiled_without_graph_breaks_and_equal() -> None:
    embeddings = draw((16, 8), torch.float32)

    def step(image: torch.Tensor, text: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return 2 * fused_dro_loss(image * 3, text, temperature=tau.exp(), impl="chunked").total

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (*embeddings[:2], torch.tensor([-2.0]))]
        total = function(*inputs)
        results.append([total, *torch.autograd.grad(total, inputs)])
    torch.testing.assert_close(results[1], results[0])


def test_meta_tensors() -> None:
    image = torch.empty(6, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    loss = fused_dro_loss(image, image.detach(), temperature=0.1, impl="chunked")
    assert (loss.total.shape, loss.total.dtype, loss.per_sample.shape) == ((), torch.float32, (6,))
    loss.total.backward()
    assert image.grad is not None
    assert (image.grad.shape, image.grad.dtype, image.grad.device.type) == ((6, 4), torch.bfloat16, "meta")
