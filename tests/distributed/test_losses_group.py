"""The loss over a group of ranks against one process on the whole batch."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from losses_parity import Case, draw, draw_ids, evaluate

from feddra_ds.engine.bootstrap import import_deepspeed
from feddra_ds.losses import fused
from feddra_ds.losses.fused import fused_dro_loss

ROWS, DIM = 7, 5  # per rank
SHARED = ("temperature gradient", "bias gradient")
CASES = {
    "plain": Case("ita"),
    "everything": Case("ita", True, True, True),
    "mean": Case("ita", False, True, True, "mean"),
    "cold": Case("ita", True, True, True, temperature=0.01),
    "directions": Case("ita", True, True, True, (0.75, 0.25)),
    "siglip": Case("siglip", True, True, True, (0.75, 0.25)),
    "positive": Case("ita", True, True, True, duplicates="positive"),
    "ignore": Case("ita", True, True, True, duplicates="ignore"),
}
FORMS = [("chunked", "gather"), ("chunked", "ring"), ("reference", "auto")]


def _errors(
    rank: int, world_size: int, cases: list[str], impl: str, exchange: str, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Relative error of each result of this rank, the scalars' shares summed over the ranks, by case."""
    embeddings = draw((ROWS * world_size, DIM), dtype)
    weights = torch.rand(ROWS * world_size, generator=torch.Generator().manual_seed(1))
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    ids = draw_ids(ROWS * world_size)
    found_errors = {}
    for name in cases:
        case = CASES[name]
        full = evaluate(
            [x.double() for x in embeddings], case, "reference", weights if case.weights else None, text_ids=ids
        )
        part, options = weights[mine] if case.weights else None, {"group": dist.group.WORLD, "exchange": exchange}
        found = evaluate([x[mine] for x in embeddings], case, impl, part, text_ids=ids[mine], **options)
        totals = [torch.zeros_like(found["total"]) for _ in range(world_size)]
        dist.all_gather(totals, found["total"])
        assert all(torch.equal(t, totals[0]) for t in totals)
        for key in SHARED:
            if key in found:
                dist.all_reduce(found[key])
        expected = {k: v if k in ("total", *SHARED) else v[mine] for k, v in full.items()}
        assert found.keys() == expected.keys()
        found_errors[name] = {
            k: float((found[k] - expected[k]).norm() / full[k].norm()) for k in found if k != "anchor"
        }
    return found_errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("impl", "exchange"), FORMS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_its_slice_of_the_full_batch(
    world_size: int, impl: str, exchange: str, dtype: torch.dtype
) -> None:
    for errors in run_ranks(_errors, world_size, list(CASES), impl, exchange, dtype):
        for case, by_name in errors.items():
            for name, error in by_name.items():
                # at τ = 0.01 one float32 process is 1e-5 off as well
                limit = 1e-12 if dtype == torch.float64 else 1e-5 if case == "cold" else 1e-6
                assert error <= limit, (case, name, error)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_bfloat16(exchange: str) -> None:
    for errors in run_ranks(
        _errors, 2, ["everything", "siglip", "positive", "ignore"], "chunked", exchange, torch.bfloat16
    ):
        for by_name in errors.values():
            for name, error in by_name.items():
                assert error <= (2e-2 if name in ("image gradient", "text gradient") else 1e-5), (name, error)


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def _largest_tensors(rank: int, world_size: int) -> dict[str, int]:
    """Entries of the largest tensor made by a step on a rank's 20 × 33 batch, by form; `auto` with the threshold at 0."""
    embeddings = draw((20, 33), torch.float32)
    largest = {}
    before = fused.RING_BYTES
    for exchange in ("gather", "ring", "auto"):
        fused.RING_BYTES = 0 if exchange == "auto" else before
        image, text = (x.requires_grad_() for x in embeddings[:2])
        with _LargestTensor() as mode:
            loss = fused_dro_loss(image, text, temperature=0.1, group=dist.group.WORLD, exchange=exchange)
            loss.total.backward()
        largest[exchange] = mode.numel
    fused.RING_BYTES = before
    return largest


def test_the_ring_never_holds_the_gathered_batch() -> None:
    for largest in run_ranks(_largest_tensors, 4):
        assert largest["gather"] >= 4 * 20 * 33  # the mode sees what it should
        assert largest["ring"] <= 20 * 33
        assert largest["auto"] <= 20 * 33


def _two_clients(rank: int, world_size: int, exchange: str, seed_of_the_other: int) -> list[Tensor]:
    """Client A is ranks 0 and 1, client B 2 and 3: what A's ranks get."""
    groups = [dist.new_group(ranks, timeout=timedelta(seconds=60)) for ranks in ([0, 1], [2, 3])]
    embeddings = draw((6, 5), torch.float32, seed=rank if rank < 2 else seed_of_the_other + rank)
    results = evaluate(embeddings, CASES["everything"], "chunked", group=groups[rank // 2], exchange=exchange)
    return list(results.values()) if rank < 2 else []


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_another_client_changes_nothing(exchange: str) -> None:
    first, second = (run_ranks(_two_clients, 4, exchange, seed) for seed in (100, 200))
    assert len(first[0]) == 7
    for rank in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first[rank], second[rank], strict=True))


def _refusals(rank: int, world_size: int) -> list[str]:
    messages = []
    unequal, equal = torch.ones(3 + rank, 4), torch.ones(3, 4)
    zeros, one_rank = torch.zeros(3), torch.full((3,), float(rank))
    for x, weight in ((unequal, None), (equal, zeros), (equal, one_rank)):
        try:
            loss = fused_dro_loss(x, x, temperature=0.1, sample_weight=weight, group=dist.group.WORLD)
            messages.append(f"total is finite: {bool(loss.total.isfinite())}")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_refusals_are_every_ranks() -> None:
    shapes = "fused_dro_loss: every rank of the group needs the same shape, but they are rank 0: (3, 4), rank 1: (4, 4)"
    weights = "sample_weight must be ≥ 0 with a positive sum over the group, but they sum to 0"
    assert run_ranks(_refusals, 2) == [[shapes, weights, "total is finite: True"]] * 2


def _nan_on_one(rank: int, world_size: int, exchange: str, impl: str) -> tuple[bool, bool]:
    image, text = (x.requires_grad_() for x in draw((6, 5), torch.float32, seed=rank)[:2])
    with torch.no_grad():
        if rank == 1:
            image[2, 3] = torch.nan
    loss = fused_dro_loss(image, text, temperature=0.1, group=dist.group.WORLD, exchange=exchange, impl=impl)
    loss.total.backward()
    assert image.grad is not None
    return bool(loss.total.isnan()), bool(image.grad.isnan().any())


@pytest.mark.parametrize(("impl", "exchange"), FORMS)
def test_nan_on_one_rank_is_everybodys(impl: str, exchange: str) -> None:
    assert run_ranks(_nan_on_one, 2, exchange, impl) == [(True, True)] * 2


def _compiled(rank: int, world_size: int, exchange: str) -> list[float]:
    embeddings = draw((6, 5), torch.float32, seed=rank)[:2]

    def step(image: Tensor, text: Tensor) -> Tensor:
        return 2 * fused_dro_loss(3 * image, text, temperature=0.1, group=dist.group.WORLD, exchange=exchange).total

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in embeddings]
        total = function(*inputs)
        results.append([total, *torch.autograd.grad(total, inputs)])
    return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.slow
def test_torch_compile_over_a_group_equals_eager() -> None:
    for exchange in ("gather", "ring"):
        for differences in run_ranks(_compiled, 2, exchange):
            assert max(differences) < 1e-5


class _Pairs(nn.Module):
    """Two linear encoders and a learnable temperature, of shape (1,) for DeepSpeed's sake."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(9, 5), nn.Linear(8, 5)
        self.log_temperature = nn.Parameter(torch.tensor([0.1]).log())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.log_temperature.exp()


def _batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(rows, 9, generator=generator), torch.randn(rows, 8, generator=generator)
    return image, text, torch.rand(rows, generator=generator)


def _deepspeed_step(rank: int, world_size: int, stages: list[int], precision: str, exchange: str) -> dict[int, Tensor]:
    """All parameters, flat, after one SGD step of lr 0.5, by ZeRO stage."""
    deepspeed = import_deepspeed(torch.device("cpu"))
    results = {}
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for stage in stages:
        model = _Pairs()
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": precision == "bf16"},
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), config=config
        )
        image, text, weights = (x[mine] for x in _batch(ROWS * world_size))
        u, v, tau = engine(image.to(dtype), text.to(dtype))
        loss = fused_dro_loss(u, v, temperature=tau, sample_weight=weights, group=dist.group.WORLD, exchange=exchange)
        engine.backward(loss.total * world_size)  # DeepSpeed averages over the ranks
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            results[stage] = torch.cat([p.detach().float().flatten() for p in model.parameters()]).clone()
    return results


def _single_step() -> tuple[Tensor, Tensor]:
    model = _Pairs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    image, text, weights = _batch(2 * ROWS)
    u, v, tau = model(image, text)
    fused_dro_loss(u, v, temperature=tau, sample_weight=weights, impl="reference").total.backward()
    optimizer.step()
    return before, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("precision", "exchange"), [("fp32", "gather"), ("fp32", "ring"), ("bf16", "gather")])
def test_a_deepspeed_step_is_the_single_process_step(precision: str, exchange: str) -> None:
    before, after = _single_step()
    moved = (after - before).abs()
    assert moved.min() > 1e-6  # every parameter moves, the temperature too
    stages = [0, 1, 2, 3] if precision == "fp32" else [1, 3]
    limit = 1e-6 if precision == "fp32" else 0.05 * float(moved.max())
    for results in run_ranks(_deepspeed_step, 2, stages, precision, exchange, fresh=True, timeout=300):
        assert list(results) == stages
        for stage, found in results.items():
            torch.testing.assert_close(found, after, rtol=limit, atol=limit, msg=lambda m, s=stage: f"ZeRO {s}: {m}")
