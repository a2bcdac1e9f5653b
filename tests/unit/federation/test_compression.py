"""The codec of compressed deltas, and tensors read as one."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from feddra_ds.federation.aggregation.compression import Codec, Joined

INT8, INT4, BF16 = Codec("int8", 16), Codec("int4", 16), Codec("bf16", 16)
LEVELS = {"int8": 127, "int4": 7}


def rows(num_rows: int, num_elements: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(num_rows, num_elements, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("codec", [INT8, INT4], ids=lambda c: c.precision)
@pytest.mark.parametrize(
    ("num_rows", "blocks", "scale"), [*product((1, 3), (1, 2, 7), (1.0, 1e-7, 1e6)), (2, 2, 1e-30)]
)
def test_error_is_half_a_level_of_its_block(codec: Codec, num_rows: int, blocks: int, scale: float) -> None:
    x = rows(num_rows, blocks * 16, scale)
    decoded = codec.decode(codec.encode(x), x.shape[1])
    largest = x.view(num_rows, blocks, 16).abs().amax(-1, keepdim=True)
    error = (decoded - x).view(num_rows, blocks, 16).abs() / largest * LEVELS[codec.precision]
    assert error.max() <= 0.5001
    assert error.max() > 0.4 or blocks == 1  # it does round


@pytest.mark.parametrize("codec", [INT8, INT4], ids=lambda c: c.precision)
def test_every_level_comes_back(codec: Codec) -> None:
    """Whole multiples of the scale, both signs, in every position of a byte; the largest of a block exactly."""
    top = LEVELS[codec.precision]
    levels = torch.arange(-top, top + 1).float()
    levels = torch.cat([levels, torch.zeros(-len(levels) % 16)])
    x = torch.stack([levels.roll(shift) for shift in range(len(levels))]).view(-1, 16)
    x[:, 0] = top  # a scale of exactly 1 in each block
    assert torch.equal(codec.decode(codec.encode(x), 16), x)


@pytest.mark.parametrize("block_size", [16, 17, 21])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_odd_blocks(block_size: int, blocks: int) -> None:
    codec = Codec("int4", block_size)
    x = rows(2, block_size * blocks).sign() * 3.5
    encoded = codec.encode(x)
    assert encoded.shape == (2, codec.num_bytes(block_size * blocks))
    assert torch.equal(codec.decode(encoded, block_size * blocks), x)


@pytest.mark.parametrize("codec", [INT8, INT4, BF16], ids=lambda c: c.precision)
@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_what_is_too_small_for_a_scale_is_sent_as_zero(codec: Codec, value: float) -> None:
    x = torch.full((1, 32), value)
    decoded = codec.decode(codec.encode(x), 32)
    assert decoded.isfinite().all()
    assert (decoded - x).abs().max() <= value


def test_a_block_of_zeros_beside_one_of_numbers() -> None:
    x = torch.cat([torch.zeros(1, 16), torch.full((1, 16), 2.0)], dim=1)
    assert torch.equal(INT8.decode(INT8.encode(x), 32), x)


def test_bf16_is_the_cast() -> None:
    x = rows(2, 32)
    assert torch.equal(BF16.decode(BF16.encode(x), 32), x.bfloat16().float())


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.5), ("int8", 0.27), ("int4", 0.15)])
def test_bytes_of_an_encoded_row(precision: str, share: float) -> None:
    codec = Codec(precision, 256)  # type: ignore[arg-type]
    size = 10 * 256
    assert codec.encode(rows(1, size)).shape[1] == codec.num_bytes(size)
    assert codec.num_bytes(size) <= share * 4 * size
    assert codec.num_bytes(size) % 4 == 0


def test_rows_are_encoded_one_by_one() -> None:
    x = rows(3, 64)
    for codec in (INT8, INT4, BF16):
        assert torch.equal(codec.encode(x), torch.cat([codec.encode(row.unsqueeze(0)) for row in x]))


def test_a_row_of_part_blocks_is_refused() -> None:
    with pytest.raises(AssertionError):
        INT8.num_bytes(17)


def test_joined_reads_and_writes_over_the_borders() -> None:
    parts = [torch.arange(3.0), torch.zeros(0), torch.arange(3.0, 4.0), torch.arange(4.0, 9.0)]
    joined = Joined(parts)
    assert len(joined) == 9
    for start, stop in ((0, 9), (0, 3), (2, 5), (3, 4), (4, 4), (8, 9)):
        assert torch.cat([torch.zeros(0), *joined.pieces(start, stop)]).tolist() == list(range(start, stop))
    out = torch.ones(4)
    joined.add_to(out, 2)
    assert out.tolist() == [3, 4, 5, 6]
    joined.assign(1, torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert parts[0].tolist() == [0, -1, -2]
    assert parts[2].tolist() == [-3]
    assert parts[3].tolist() == [-4, 5, 6, 7, 8]
    assert len(Joined([])) == 0
