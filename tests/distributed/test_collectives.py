"""Gathers and their gradients, the ring, and uneven parts; and that no group means no communication."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor

from feddra_ds.distributed.collectives import (
    RingShift,
    all_max,
    all_sum,
    gather,
    gather_ints,
    gather_uneven,
    group_rank,
    group_size,
    require_equal_shapes,
    scale_gradient,
)


def _gather(rank: int, world_size: int, backward: str) -> tuple[Tensor, Tensor]:
    x = torch.tensor([[rank + 1.0], [rank + 11.0]], requires_grad=True)
    everything = gather(x, dist.group.WORLD, backward)
    (everything.flatten() * torch.arange(2.0 * world_size) * (rank + 1)).sum().backward()
    assert x.grad is not None
    return everything.detach().flatten(), x.grad.flatten()


def test_gather_gives_all_rows_and_the_gradient_that_was_asked_for() -> None:
    for rank, (everything, grad) in enumerate(run_ranks(_gather, 4, "slice")):
        assert everything.tolist() == [1, 11, 2, 12, 3, 13, 4, 14]
        assert grad.tolist() == [2 * rank * (rank + 1), (2 * rank + 1) * (rank + 1)]
    for rank, (_, grad) in enumerate(run_ranks(_gather, 4, "sum")):
        assert grad.tolist() == [2 * rank * 10, (2 * rank + 1) * 10]  # 1 + 2 + 3 + 4 losses


def _uneven(rank: int, world_size: int, rows: list[int]) -> Tensor:
    return gather_uneven(torch.full((rows[rank], 2), float(rank), requires_grad=True), dist.group.WORLD)


@pytest.mark.parametrize("rows", [[3, 1], [0, 2], [2, 2], [0, 0]])
def test_gather_of_uneven_parts(rows: list[int]) -> None:
    expected = [0.0] * rows[0] + [1.0] * rows[1]
    for found in run_ranks(_uneven, 2, rows):
        assert found.shape == (sum(rows), 2)
        assert found[:, 0].tolist() == expected
        assert not found.requires_grad


def _ring(rank: int, world_size: int) -> tuple[float, list[int]]:
    x, y = torch.tensor([float(rank)]), torch.full((2,), 10 * rank)
    for _ in range(2):
        x, y = RingShift([x, y], dist.group.WORLD).wait()
    return float(x), y.tolist()


def test_the_ring_passes_on_to_the_next_rank() -> None:
    assert run_ranks(_ring, 4) == [(2.0, [20, 20]), (3.0, [30, 30]), (0.0, [0, 0]), (1.0, [10, 10])]


def _small(rank: int, world_size: int) -> tuple:
    group = dist.group.WORLD
    x = torch.tensor([rank, -rank])
    return (
        group_size(group),
        group_rank(group),
        all_sum(x, group).tolist(),
        all_max(x, group).tolist(),
        gather_ints([rank, 7], group, torch.device("cpu")),
        x.tolist(),
    )


def test_small_helpers() -> None:
    for rank, found in enumerate(run_ranks(_small, 2)):
        assert found == (2, rank, [1, -1], [1, 0], [[0, 7], [1, 7]], [rank, -rank])


def test_without_a_group_nothing_is_sent() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert not dist.is_initialized()
    assert (group_size(None), group_rank(None)) == (1, 0)
    assert gather(x, None, "slice") is x
    assert torch.equal(gather_uneven(x, None), x)
    assert torch.equal(all_sum(x, None), x)
    assert torch.equal(all_max(x, None), x)
    assert gather_ints([4, 5], None, x.device) == [[4, 5]]
    require_equal_shapes(x, None, "x")


def test_scaled_gradient() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    (3 * y).backward()
    assert y.item() == 2.0
    assert x.grad is not None
    assert x.grad.item() == 0.75
