"""The largest elements of each block, in a few bits: what travels where aggregate.sparsity is set.

After SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706): top-k within blocks of 4,096, 2 to 4 bits a value, error feedback.

Legend: N blocks of B elements (4,096, a power of 2), k of each travel, b bits a value, ℓ = ⌊log₂(B/k)⌋. A block is encoded as

    2^(b−1) bf16   the means of |x| over the bins, equal parts of the range of the k |x|
    k·ℓ bits       the low bits of the k places, which are in rising order            (Elias-Fano, about log₂(B/k) + 2
    k + B/2^ℓ bits the i-th place's high bits h_i: bit h_i + i is set                  bits a place, for 12 of a plain index)
    k·b bits       the value's sign and bin

Where fewer than k elements of a block are not 0, the bin of the zeros is sent as 0: what did not change is left alone. A bin's
mean never makes what is left larger than the block, however heavy its tail is, so that error feedback converges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCodec:
    """Encodes rows of fp32 elements into bytes, as `compression.Codec` does; all blocks take the same bytes."""

    value_bits: int
    sparsity: float
    block_size: int = 4096

    @property
    def granularity(self) -> int:
        """Elements that a row must be a multiple of."""
        return self.block_size

    @property
    def num_kept(self) -> int:
        """k."""
        return max(1, round(self.sparsity * self.block_size))

    @property
    def _num_bins(self) -> int:
        return 1 << (self.value_bits - 1)

    @property
    def _low_bits(self) -> int:
        return (self.block_size // self.num_kept).bit_length() - 1

    @property
    def _fields(self) -> list[int]:
        """Bits of a block's low parts of places, high parts, values."""
        k, low = self.num_kept, self._low_bits
        return [k * low, k + (self.block_size >> low), k * self.value_bits]

    @property
    def _block_bytes(self) -> int:
        return 2 * self._num_bins + -(-sum(self._fields) // 8)

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of an encoded row; num_elements a multiple of `granularity`."""
        assert num_elements % self.block_size == 0, num_elements
        return num_elements // self.block_size * self._block_bytes

    def encode(self, x: Tensor) -> Tensor:
        """(R, c) fp32, finite → (R, num_bytes(c)) uint8, on the same device."""
        blocks = x.view(-1, self.block_size)
        places = blocks.abs().topk(self.num_kept, sorted=False).indices.sort(dim=1).values  # (N, k)
        values = blocks.gather(1, places)
        bins, means = self._binned(values.abs())
        codes = bins + self._num_bins * (values < 0)
        low = self._low_bits
        high = torch.zeros((len(blocks), self._fields[1]), dtype=torch.uint8, device=x.device)
        high.scatter_(1, (places >> low) + torch.arange(self.num_kept, device=x.device), 1)
        bits = torch.cat([_bits(places, low), high, _bits(codes, self.value_bits)], dim=1)
        return torch.cat([means.view(torch.uint8), _packed(bits)], dim=1).view(len(x), -1)

    def _binned(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """|x| (N, k) → bins (N, k) int64, and the bins' means (N, 2^(b−1)) bf16, 0 for an empty one."""
        start, end = sizes.amin(1, keepdim=True), sizes.amax(1, keepdim=True)
        span = (end - start).clamp_min_(1e-38)
        bins = ((sizes - start).div_(span).mul_(self._num_bins)).long().clamp_max_(self._num_bins - 1)
        means = sizes.new_empty((len(sizes), self._num_bins))
        for index in range(self._num_bins):  # not scatter_add, whose sums on a GPU have no fixed order
            inside = bins == index
            means[:, index] = (sizes * inside).sum(1) / inside.sum(1).clamp_min_(1)
        means[:, :1].masked_fill_(start == 0, 0.0)
        return bins, means.to(torch.bfloat16)

    def decode(self, encoded: Tensor, num_elements: int) -> Tensor:
        """(R, num_bytes(c)) uint8 → (R, c) fp32, c = num_elements: the same bits everywhere."""
        records = encoded.reshape(-1, self._block_bytes)
        k, head = self.num_kept, 2 * self._num_bins
        means = records[:, :head].clone(memory_format=torch.contiguous_format)  # a record may begin at an odd byte
        bits = _unpacked(records[:, head:])[:, : sum(self._fields)]
        low, high, codes = bits.split(self._fields, dim=1)
        highs = high.nonzero()[:, 1].view(-1, k) - torch.arange(k, device=encoded.device)
        places = (highs << self._low_bits) + _numbers(low, k, self._low_bits)
        code = _numbers(codes, k, self.value_bits)
        values = means.view(torch.bfloat16).float().gather(1, code % self._num_bins)
        values = torch.where(code < self._num_bins, values, -values)
        out = torch.zeros((len(records), self.block_size), device=encoded.device)
        return out.scatter_(1, places, values).view(-1, num_elements)


def _bits(numbers: Tensor, width: int) -> Tensor:
    """(N, k) whole numbers → (N, k · width) uint8 of 0 and 1, the lowest bit of each first."""
    shifts = torch.arange(width, device=numbers.device)
    return (numbers.unsqueeze(-1) >> shifts & 1).to(torch.uint8).flatten(1)


def _numbers(bits: Tensor, k: int, width: int) -> Tensor:
    """The inverse of `_bits`, int64."""
    shifts = torch.arange(width, device=bits.device)
    return (bits.view(-1, k, width).long() << shifts).sum(-1)


def _packed(bits: Tensor) -> Tensor:
    """(N, n) uint8 of 0 and 1 → (N, ⌈n / 8⌉) uint8."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.view(len(bits), -1, 8) << shifts).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """The inverse of `_packed`, padding included."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(1)
