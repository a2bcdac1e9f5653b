"""The codec of sparse deltas: what comes back, in how many bytes, and how far off."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from feddra_ds.federation.aggregation.sparse import SparseCodec

BLOCK = 4096
CODECS = [SparseCodec(bits, k / BLOCK) for bits, k in product((2, 4), (1, 64, 205, 1024))]
ids = lambda codec: f"{codec.value_bits} bits, k {codec.num_kept}"


def rows(num_rows: int, num_blocks: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, no two sizes of a block alike."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.standard_t(2, (num_rows, num_blocks * BLOCK)).astype(np.float32))


def plain(x: np.ndarray, codec: SparseCodec) -> np.ndarray:
    """What a block (B,) decodes to, element by element; means in float64."""
    order = sorted(range(len(x)), key=lambda place: -abs(x[place]))[: codec.num_kept]
    sizes = {place: abs(float(x[place])) for place in order}
    low, high, num_bins = min(sizes.values()), max(sizes.values()), 2 ** (codec.value_bits - 1)
    bins: dict[int, list[int]] = {}
    for place, size in sizes.items():
        at = 0 if high == low else int((size - low) / (high - low) * num_bins)
        bins.setdefault(min(at, num_bins - 1), []).append(place)
    out = np.zeros(len(x))
    for inside in bins.values():
        mean = np.mean([sizes[place] for place in inside])
        out[inside] = np.sign(x[inside]) * mean
    return out


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_against_a_plain_version(codec: SparseCodec) -> None:
    """The places exactly, the values to bf16: 2^-9 of each."""
    x = rows(2, 3)
    decoded = codec.decode(codec.encode(x), 3 * BLOCK).view(-1, BLOCK).numpy()
    for block, found in zip(x.view(-1, BLOCK).numpy(), decoded, strict=True):
        expected = plain(block, codec)
        assert np.array_equal(found != 0, expected != 0)
        assert np.count_nonzero(found) == codec.num_kept
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_bytes(codec: SparseCodec) -> None:
    """⌊log₂(B/k)⌋ + 1 + b bits an element, B / 2^ℓ bits and 2^(b−1) bf16 a block, and not one more."""
    k = codec.num_kept
    low = int(math.log2(BLOCK / k))
    bits = k * (low + 1 + codec.value_bits) + BLOCK // 2**low
    of_a_block = math.ceil(bits / 8) + 2 * 2 ** (codec.value_bits - 1)
    assert codec.num_bytes(6 * BLOCK) == 6 * of_a_block
    assert codec.encode(rows(2, 3)).shape == (2, 3 * of_a_block)
    assert bits / k - codec.value_bits <= math.log2(BLOCK / k) + 3, "a place in at most 3 bits more than log₂(B/k)"


@pytest.mark.parametrize(("bits", "sparsity", "share"), [(2, 1 / 64, 0.0051), (2, 0.05, 0.0132), (4, 0.05, 0.0170)])
def test_share_of_the_fp32_bytes(bits: int, sparsity: float, share: float) -> None:
    """What docs/compression.md says."""
    codec = SparseCodec(bits, sparsity)
    assert round(codec.num_bytes(100 * BLOCK) / (400 * BLOCK), 4) == share


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("where", ["first", "last", "ends"])
def test_places_at_the_borders_of_a_block(codec: SparseCodec, where: str) -> None:
    k = codec.num_kept
    places = {
        "first": list(range(k)),
        "last": list(range(BLOCK - k, BLOCK)),
        "ends": list(range(k // 2)) + list(range(BLOCK - (k - k // 2), BLOCK)),
    }[where]
    x = torch.zeros(1, BLOCK)
    x[0, places] = torch.tensor([3.0, -3.0]).repeat(k)[:k]  # one size: exact
    assert torch.equal(codec.decode(codec.encode(x), BLOCK), x)


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_blocks_of_nothing_and_of_one_number(codec: SparseCodec) -> None:
    x = torch.zeros(1, 3 * BLOCK)
    x[0, BLOCK + 7] = -0.5
    decoded = codec.decode(codec.encode(x), 3 * BLOCK)
    assert decoded.isfinite().all()
    assert torch.equal(decoded, x)
    tiny = torch.full((1, BLOCK), 1e-44)
    assert (codec.decode(codec.encode(tiny), BLOCK) - tiny).abs().max() <= 1e-44


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_what_did_not_change_is_left_alone(codec: SparseCodec) -> None:
    """Rows of an embedding that no batch had: a few elements of a block move, fewer than travel."""
    x = rows(1, 2)
    x[:, 40:BLOCK] = 0
    decoded = codec.decode(codec.encode(x), 2 * BLOCK)
    assert not decoded[x == 0].any()
    assert decoded[:, :40].any()


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_is_less_than_what_there_was(codec: SparseCodec, seed: int) -> None:
    """‖x − Q(x)‖ < ‖x‖ in each block, however heavy its tail: else error feedback would grow."""
    x = rows(1, 2, seed) ** 3  # one element has most of the energy
    left = (x - codec.decode(codec.encode(x), 2 * BLOCK)).view(-1, BLOCK).norm(dim=1)
    assert (left < x.view(-1, BLOCK).norm(dim=1)).all()


def test_feedback_sends_everything_in_the_end() -> None:
    """Sent and residual together are what there was at each step; without new deltas the residual goes to 0."""
    codec = SparseCodec(2, 0.05)
    owed = rows(1, 1)
    total, sent, start = owed.double(), torch.zeros(1, BLOCK).double(), owed.norm()
    for _ in range(100):
        decoded = codec.decode(codec.encode(owed), BLOCK)
        owed = owed - decoded
        sent += decoded
        assert torch.allclose(sent + owed.double(), total, rtol=0, atol=1e-4)
    assert owed.norm() < 0.05 * start


def test_rows_are_encoded_one_by_one() -> None:
    x = rows(3, 2)
    for codec in CODECS:
        assert torch.equal(codec.encode(x), torch.cat([codec.encode(row.unsqueeze(0)) for row in x]))


def test_a_row_of_part_blocks_is_refused() -> None:
    with pytest.raises(AssertionError):
        CODECS[0].num_bytes(BLOCK + 1)
