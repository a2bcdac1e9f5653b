"""Compare an implementation of the loss with `reference` in float64, on what the implementation was given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from feddra_ds.losses.fused import fused_dro_loss

KINDS = ["ita", "siglip"]
UPSTREAM = -3.7  # a gradient that arrives at the loss
# Of the float64 result's norm. The losses themselves are float32 arithmetic whatever the inputs are.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One combination of what the loss can be asked for."""

    kind: str = "ita"
    anchors: bool = False
    weights: bool = False
    learnable: bool = False
    reduction: str | tuple[float, float] = "sum"
    temperature: float = 0.07
    duplicates: str = "negative"


def all_cases(kind: str) -> Iterator[Case]:
    """Every combination, 16 of them."""
    for anchors, weights, learnable, reduction in itertools.product(
        (False, True), (False, True), (False, True), ("sum", "mean")
    ):
        yield Case(kind, anchors, weights, learnable, reduction)


def some_cases(kind: str) -> Iterator[Case]:
    """Four of them, in which every two options meet in every pair of values but one, and unequal directions."""
    yield Case(kind, True, True, True, "sum")
    yield Case(kind, False, False, True, "mean")
    yield Case(kind, True, False, False, "mean")
    yield Case(kind, False, True, False, "sum")
    yield Case(kind, True, True, True, (0.75, 0.25))


def draw(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Image, text and their anchors: somewhat alike, so that losses differ from chance, with norms from 0.5 to 4."""
    generator = torch.Generator().manual_seed(seed)
    common = 0.5 * torch.randn(shape, generator=generator)
    norms = 0.5 + 3.5 * torch.rand(4, shape[0], 1, generator=generator)
    return [((common + torch.randn(shape, generator=generator)) * n).to(device, dtype) for n in norms]


def draw_ids(num_pairs: int) -> Tensor:
    """A report each: about every third pair has that of another."""
    return torch.randint(0, num_pairs, (num_pairs,), generator=torch.Generator().manual_seed(5)) // 2


def evaluate(
    embeddings: list[Tensor], case: Case, impl: str, weights: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The four results and every gradient, under the upstream gradient UPSTREAM."""
    image, text, *anchors = (x.detach().clone() for x in embeddings)
    image.requires_grad_()
    text.requires_grad_()
    scalar = torch.float64 if image.dtype == torch.float64 else torch.float32
    tau = torch.tensor([case.temperature], dtype=scalar, device=image.device, requires_grad=case.learnable)
    bias = torch.tensor(-1.5, dtype=scalar, device=image.device, requires_grad=case.learnable)
    if case.weights and weights is None:
        weights = torch.rand(len(image), generator=torch.Generator().manual_seed(1)).to(image.device)
    loss = fused_dro_loss(
        image,
        text,
        *(anchors if case.anchors else ()),
        temperature=tau if case.learnable else case.temperature,
        anchor_weight=0.7 if case.anchors else 0.0,
        sample_weight=weights,
        direction_reduction=case.reduction,
        impl=impl,
        kind=case.kind,
        bias=bias if case.kind == "siglip" else None,
        duplicates=case.duplicates,
        **options,
    )
    assert not any(x.requires_grad for x in loss[1:])
    (loss.total * UPSTREAM).backward()
    results = {**loss._asdict(), "image gradient": image.grad, "text gradient": text.grad}
    if case.learnable:
        results["temperature gradient"] = tau.grad
        if case.kind == "siglip":
            results["bias gradient"] = bias.grad
    assert all(isinstance(x, Tensor) for x in results.values())
    return {name: x.detach() for name, x in results.items()}


def assert_parity(
    embeddings: list[Tensor],
    case: Case,
    impl: str,
    factor: float = 1.0,
    floor: float = 0.0,
    weights: Tensor | None = None,
    **options: Any,
) -> None:
    """Every result within `factor` × TOLERANCE of the float64 reference's norm (or of `floor`, where that is larger)."""
    found = evaluate(embeddings, case, impl, weights, **options)
    expected = evaluate([x.double() for x in embeddings], case, "reference", weights, **options)
    assert found.keys() == expected.keys()
    dtype = embeddings[0].dtype
    for name, value in found.items():
        gradient = name in ("image gradient", "text gradient")
        assert value.dtype == (dtype if gradient else torch.promote_types(dtype, torch.float32)), name
        assert value.shape == expected[name].shape, name
        assert value.isfinite().all(), (name, case)
        tolerance = (
            TOLERANCE[dtype] if "gradient" in name else max(TOLERANCE[torch.float64], min(1e-5, TOLERANCE[dtype]))
        )
        scale = max(float(expected[name].norm()), floor)
        error = float((value.double() - expected[name]).norm())
        assert error <= factor * tolerance * scale, f"{name}: off by {error / max(scale, 1e-300):.1e} for {case}"


def check_extreme(extreme: str, kind: str, dtype: torch.dtype, device: str, impl: str) -> None:
    """Finite and equal to float64 at the edges of what a batch can be."""
    embeddings = draw((9 if extreme != "one pair" else 1, 16), dtype, device)
    case, factor, floor, weights = Case(kind, anchors=True, learnable=True), 1.0, 0.0, None
    if extreme == "cold":
        case, factor = Case(kind, anchors=True, learnable=True, temperature=0.01), 10  # S is rounded at 100, not at 14
    elif extreme == "tiny norms":
        embeddings = [x * 1e-6 for x in embeddings]
    elif extreme == "huge norms":
        embeddings = [x * 1e6 for x in embeddings]
    elif extreme == "one weight":
        weights = torch.zeros(9, device=device)
        weights[4] = 3.0
    elif extreme in ("identical rows", "one pair"):
        embeddings = [x[:1].expand(x.shape).contiguous() for x in embeddings]
        floor = abs(UPSTREAM) / case.temperature  # true gradients are 0, as differences of terms of this size
    assert_parity(embeddings, case, impl, factor, floor, weights)


def check_nan(where: str, device: str, impl: str) -> None:
    """A NaN anywhere in the inputs makes the total NaN, and the gradients of what it meets."""
    image, text, image_anchor, text_anchor = draw((20, 16), torch.float32, device)
    image.requires_grad_()
    tau, weights = torch.tensor(0.07, device=device), torch.ones(20, device=device)
    target = {"image": image, "text": text, "image anchor": image_anchor, "temperature": tau, "weight": weights}[where]
    with torch.no_grad():
        target.view(-1)[len(target.view(-1)) // 2] = torch.nan
    loss = fused_dro_loss(
        image, text, image_anchor, text_anchor, temperature=tau, anchor_weight=1.0, sample_weight=weights, impl=impl
    )
    loss.total.backward()
    assert loss.total.isnan()
    assert image.grad is not None
    assert image.grad.isnan().any()
    if where != "weight":
        assert loss.per_sample.isnan().sum() == (1 if where == "image anchor" else 20)


def train(steps: int, impl: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """All weights after `steps` of SGD on two linear encoders, a learnable temperature and fixed random pairs."""
    torch.manual_seed(0)
    encoders = [nn.Linear(12, 8).to(device), nn.Linear(10, 8).to(device)]
    log_tau = torch.tensor([0.2], device=device).log().requires_grad_()
    pairs = [torch.randn(24, n.in_features).to(device) for n in encoders]
    anchors = [n(x).detach() for n, x in zip(encoders, pairs, strict=True)]
    parameters = [log_tau, *(p for n in encoders for p in n.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        image, text = (n(x).to(dtype) for n, x in zip(encoders, pairs, strict=True))
        loss = fused_dro_loss(image, text, *anchors, temperature=log_tau.exp(), anchor_weight=2.0, impl=impl)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters]).cpu()
