"""Compressed sums over raw peer groups of 2 and 4, as the aggregation uses them."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
from spawn import free_port, run_ranks

from feddra_ds.federation.aggregation.compression import Codec, CompressedSum, DeltaCodec
from feddra_ds.federation.aggregation.sparse import SparseCodec

SIZES = (1000, 1, 4099, 300)  # flat tensors; nothing divides anything
BUCKET = 2048  # three buckets, the last not full
ROUNDS = 12
CODECS: dict[str, DeltaCodec] = {
    "bf16": Codec("bf16", 64),
    "int8": Codec("int8", 64),
    "int4": Codec("int4", 64),
    "sparse": SparseCodec(4, 0.25, block_size=256),
}
# of a size at which the shares of bytes are stated
BIG: dict[str, DeltaCodec] = {
    "bf16": Codec("bf16", 256),
    "int8": Codec("int8", 256),
    "int4": Codec("int4", 256),
    "sparse": SparseCodec(2, 0.05),
}
# a step of each, relative to the largest of a block; what of a block does not travel is smaller than what does
LEVEL = {"bf16": 2**-8, "int8": 1 / 127, "int4": 1 / 7, "sparse": 0.5}


def deltas_of(rank: int, round_index: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * round_index + rank)
    return [torch.randn(size, generator=generator) for size in SIZES]


def case(rank: int, num_peers: int, port: int) -> dict[str, Any]:
    store = torch.distributed.TCPStore("127.0.0.1", port, num_peers, rank == 0, timedelta(seconds=60))
    group = torch.distributed.ProcessGroupGloo(store, rank, num_peers, timedelta(seconds=60))
    out: dict[str, Any] = {}
    for precision, codec in CODECS.items():
        exchange = CompressedSum(codec, group, rank, num_peers, torch.device("cpu"), BUCKET)
        residuals = [torch.zeros(size) for size in SIZES]
        once = []
        for _ in range(2):  # from the same state, twice
            deltas = deltas_of(rank, 0)
            residuals = [torch.zeros(size) for size in SIZES]
            exchange.run(deltas, residuals)
            once.append(torch.cat(deltas + residuals))
        total = torch.zeros(sum(SIZES))
        residuals = [torch.zeros(size) for size in SIZES]
        for _ in range(ROUNDS):  # the same delta each round
            repeated = deltas_of(rank, 0)
            exchange.run(repeated, residuals)
            total += torch.cat(repeated)
        out[precision] = {
            "deltas": once[0][: sum(SIZES)],
            "residuals": once[0][sum(SIZES) :],
            "again": once[1],
            "bytes": exchange.num_bytes // (2 + ROUNDS),
            "total": total,
            "last_residuals": torch.cat(residuals),
        }
    for precision, codec in BIG.items():
        exchange = CompressedSum(codec, group, rank, num_peers, torch.device("cpu"))
        exchange.run([torch.randn(100_000)], [torch.zeros(100_000)])
        out[f"bytes of {precision}"] = exchange.num_bytes
    empty = CompressedSum(BIG["int8"], group, rank, num_peers, torch.device("cpu"))
    empty.run([], [])
    out["bytes of nothing"] = empty.num_bytes
    store.set(f"done{rank}", "1")
    store.wait([f"done{r}" for r in range(num_peers)])
    return out


@cache
def results(num_peers: int) -> list[dict[str, Any]]:
    return run_ranks(case, num_peers, free_port(), init_group=False, timeout=120)


def stack(num_peers: int, precision: str, key: str) -> torch.Tensor:
    return torch.stack([result[precision][key] for result in results(num_peers)])


def exact_sum(num_peers: int) -> torch.Tensor:
    return sum(torch.cat(deltas_of(rank, 0)).double() for rank in range(num_peers))  # type: ignore[return-value]


cases = pytest.mark.parametrize("num_peers", [2, 4])
precisions = pytest.mark.parametrize("precision", CODECS)


@cases
@precisions
def test_all_peers_hold_the_same_bits_and_get_them_again(num_peers: int, precision: str) -> None:
    deltas = stack(num_peers, precision, "deltas")
    assert all(torch.equal(deltas[0], other) for other in deltas[1:])
    both = torch.cat([deltas, stack(num_peers, precision, "residuals")], dim=1)
    assert torch.equal(both, stack(num_peers, precision, "again"))


@cases
@precisions
def test_the_sum_is_right_to_a_level_and_the_rest_is_owed(num_peers: int, precision: str) -> None:
    delta = stack(num_peers, precision, "deltas")[0].double()
    owed = stack(num_peers, precision, "residuals").double()
    exact = exact_sum(num_peers)
    assert torch.allclose(delta + owed.sum(0), exact, rtol=0, atol=1e-5)  # nothing is lost
    error = (delta - exact).abs().max()
    largest = 5.0 * num_peers  # of a normal draw, summed
    assert 0 < error <= largest * LEVEL[precision]
    assert (owed != 0).any(dim=1).all()  # every peer rounds


@cases
@precisions
def test_feedback_keeps_the_error_from_growing(num_peers: int, precision: str) -> None:
    """Of 12 equal rounds nothing is lost but what is owed at the end; without feedback the bias is 12 times one's."""
    total = stack(num_peers, precision, "total")[0].double()
    owed = stack(num_peers, precision, "last_residuals").double().sum(0)
    exact = ROUNDS * exact_sum(num_peers)
    assert torch.allclose(total + owed, exact, rtol=0, atol=1e-3)
    with_feedback = (total - exact).square().mean().sqrt()
    bias = (ROUNDS * stack(num_peers, precision, "deltas")[0].double() - exact).square().mean().sqrt()
    assert with_feedback < 0.25 * bias


@cases
@precisions
def test_bytes_are_counted_exactly(num_peers: int, precision: str) -> None:
    """(S − 1) chunks in the reduce-scatter and one in the all-gather, bucket by bucket."""
    codec = CODECS[precision]
    expected = 0
    for start in range(0, sum(SIZES), BUCKET):
        n = min(BUCKET, sum(SIZES) - start)
        chunk = -(-n // (num_peers * codec.granularity)) * codec.granularity
        expected += num_peers * codec.num_bytes(chunk)
    assert {result[precision]["bytes"] for result in results(num_peers)} == {expected}


@cases
@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.501), ("int8", 0.27), ("int4", 0.15), ("sparse", 0.02)])
def test_share_of_the_fp32_bytes(num_peers: int, precision: str, share: float) -> None:
    for result in results(num_peers):
        assert 0 < result[f"bytes of {precision}"] <= share * 4 * 100_000
        assert result["bytes of nothing"] == 0
