"""Fewer bytes between peers: encoded deltas (bf16, blockwise int8/int4, sparse), reduce-scatter and all-gather, error feedback.

Legend: S peers, s and r among them; n elements of a bucket; c elements of a chunk (n / S rounded up to whole blocks).

Peer s has a delta Δ_s of the same n elements. With Q the codec and e_s what it still owes (its residual), v_s = Δ_s + e_s:

    1. chunk r of Q(v_s) goes to peer r, which alone sums chunk r:   m_r = v_r[r] + Σ_(s≠r) Q(v_s)[r]   in fp32, by slot
    2. Q(m_r) goes to everybody; all decode the same bytes, so all hold the same bits:   Δ[r] = Q(m_r)
    3. e_s[r] = v_s[r] − Q(v_s)[r] for s ≠ r,   e_r[r] = m_r − Q(m_r)

Both rounding errors stay with a peer: Δ + Σ_s e_s = Σ_s v_s to fp32 rounding, so nothing is lost, only late. A peer sends
(S − 1)/S · n and n/S encoded elements, n together, for any S, as a ring all-reduce sends 2 (S − 1)/S · n and is handed n.
An all-gather of Q(v_s) would send (S − 1) · n; docs/compression.md compares the two for sparse deltas.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from feddra_ds.federation.aggregation.sparse import SparseCodec

# fp32 elements on their way at a time; two buckets overlap. A CPU's stay in its cache, a GPU's keep it busy.
BUCKET_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
_LEVELS = {"int8": 127, "int4": 7}
_SMALLEST_SCALE = 1e-38  # below it 1/scale overflows; such a block is sent as zeros and stays in the residual


@dataclass(frozen=True)
class Codec:
    """Encodes rows of fp32 elements into bytes.

    bf16: two bytes an element. int8, int4: one fp32 scale, max|x| / 127 or / 7, per block_size elements, then one byte
    or half a byte an element, symmetric around 0. A row is its scales, then its elements: a multiple of 4 bytes.
    """

    precision: Literal["bf16", "int8", "int4"]
    block_size: int

    @property
    def granularity(self) -> int:
        """Elements that a row must be a multiple of."""
        return 2 if self.precision == "bf16" else self.block_size

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of an encoded row; num_elements a multiple of `granularity`."""
        assert num_elements % self.granularity == 0, (num_elements, self.granularity)
        if self.precision == "bf16":
            return 2 * num_elements
        payload = num_elements if self.precision == "int8" else -(-num_elements // 2)
        return 4 * (num_elements // self.block_size) + -(-payload // 4) * 4

    def encode(self, x: Tensor) -> Tensor:
        """(R, c) fp32, finite → (R, num_bytes(c)) uint8, on the same device. The same input gives the same bytes."""
        if self.precision == "bf16":
            return x.to(torch.bfloat16).view(torch.uint8)
        rows, c = x.shape
        blocks = x.view(rows, -1, self.block_size)
        scale = blocks.abs().amax(dim=-1).div_(_LEVELS[self.precision])  # aminmax is ten times slower on a CPU
        scale.masked_fill_(scale < _SMALLEST_SCALE, 0.0)
        inverse = scale.reciprocal().masked_fill_(scale == 0, 0.0)
        whole = (blocks * inverse.unsqueeze(-1)).round_().to(torch.int8).view(rows, c)
        out = x.new_zeros((rows, self.num_bytes(c)), dtype=torch.uint8)
        head = 4 * scale.shape[1]
        out[:, :head] = scale.view(torch.uint8)
        if self.precision == "int8":
            out[:, head : head + c] = whole.view(torch.uint8)
        else:
            half = -(-c // 2)  # elements i and half + i share a byte
            packed = out[:, head : head + half]
            packed.copy_((whole[:, :half] & 15).view(torch.uint8))
            packed[:, : c - half] |= (whole[:, half:] << 4).view(torch.uint8)
        return out

    def decode(self, encoded: Tensor, num_elements: int) -> Tensor:
        """(R, num_bytes(c)) uint8 → (R, c) fp32, c = num_elements: one rounded product an element, equal everywhere."""
        if self.precision == "bf16":
            return encoded.contiguous().view(torch.bfloat16).float()
        rows, c, head = encoded.shape[0], num_elements, 4 * (num_elements // self.block_size)
        scale = encoded[:, :head].contiguous().view(torch.float32)
        if self.precision == "int8":
            whole = encoded[:, head : head + c].view(torch.int8)
        else:
            packed = encoded[:, head : head + -(-c // 2)].view(torch.int8)
            whole = torch.cat([packed << 4 >> 4, (packed >> 4)[:, : c // 2]], dim=1)  # arithmetic shifts: signs survive
        out = whole.reshape(rows, -1, self.block_size).float()
        return out.mul_(scale.unsqueeze(-1)).view(rows, c)


DeltaCodec = Codec | SparseCodec


def codec_of(precision: str, block_size: int, sparsity: float | None) -> DeltaCodec | None:
    """The codec of the deltas by the keys of the section `aggregate`; None where fp32 weights travel."""
    if precision == "fp32":
        return None
    if sparsity is not None:
        return SparseCodec(int(precision.removeprefix("int")), sparsity)
    return Codec(precision, block_size)  # type: ignore[arg-type]  # config/checks.py refuses int2 here


class Joined:
    """Flat tensors, read and written as if they were one."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = [t for t in tensors if t.numel()]
        self._ends = list(accumulate(t.numel() for t in self._tensors))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """Views which together are elements [start, stop)."""
        index = bisect_right(self._ends, start)
        while start < stop:
            end = self._ends[index]
            tensor, first = self._tensors[index], end - self._tensors[index].numel()
            yield tensor[start - first : min(stop, end) - first]
            start, index = end, index + 1

    def add_to(self, out: Tensor, start: int) -> None:
        """out += elements from `start` on, len(out) of them; `out` may be on another device."""
        for part, piece in self._along(out, start):
            part.add_(piece.to(part.device))

    def assign(self, start: int, values: Tensor) -> None:
        """Overwrite elements from `start` on."""
        for part, piece in self._along(values, start):
            piece.copy_(part)

    def _along(self, flat: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        offset = 0
        for piece in self.pieces(start, start + flat.numel()):
            yield flat[offset : offset + piece.numel()], piece
            offset += piece.numel()


class CompressedSum:
    """Sums tensors over the peers of a process group as the module says. Every peer builds one and calls `run`."""

    def __init__(
        self,
        codec: DeltaCodec,
        peers: dist.ProcessGroup,
        rank: int,
        num_peers: int,
        device: torch.device,
        bucket_elements: int | None = None,
    ):
        """rank: among the peers; device: where the group communicates (the host for gloo, the GPU for NCCL)."""
        self.codec, self.peers, self.rank, self.num_peers, self.device = codec, peers, rank, num_peers, device
        self.bucket_elements = bucket_elements or BUCKET_ELEMENTS[device.type]
        self.num_bytes = 0  # handed to collectives so far
        self._others = [s for s in range(num_peers) if s != rank]

    def run(self, deltas: Sequence[Tensor], residuals: Sequence[Tensor]) -> None:
        """In place: deltas ← the decoded sum, the same bits on every peer; residuals ← what this peer still owes.

        Both: flat fp32 host tensors of the same sizes, in the same order on every peer. Collective over the peers.
        """
        delta, residual = Joined(deltas), Joined(residuals)
        assert len(delta) == len(residual), (len(delta), len(residual))
        under_way: _Bucket | None = None
        for start in range(0, len(delta), self.bucket_elements):
            bucket = self._start(delta, residual, start)
            if under_way is not None:
                self._finish(under_way, delta, residual)
            under_way = bucket
        if under_way is not None:
            self._finish(under_way, delta, residual)

    def _start(self, delta: Joined, residual: Joined, start: int) -> _Bucket:
        n = min(self.bucket_elements, len(delta) - start)
        c = -(-n // (self.num_peers * self.codec.granularity)) * self.codec.granularity
        owed = torch.zeros(self.num_peers * c, device=self.device)
        delta.add_to(owed[:n], start)
        residual.add_to(owed[:n], start)
        owed = owed.view(self.num_peers, c)
        sent = torch.empty((len(self._others), self.codec.num_bytes(c)), dtype=torch.uint8, device=self.device)
        for row, s in zip(sent.split(1), self._others, strict=True):
            row.copy_(self.codec.encode(owed[s : s + 1]))
            owed[s : s + 1] -= self.codec.decode(row, c)
        received = torch.empty_like(sent)
        sizes = [0 if s == self.rank else sent.shape[1] for s in range(self.num_peers)]
        work = self.peers.alltoall_base(received.view(-1), sent.view(-1), sizes, sizes)
        self.num_bytes += sent.numel()
        return _Bucket(start, n, owed, sent, received, work)

    def _finish(self, bucket: _Bucket, delta: Joined, residual: Joined) -> None:
        bucket.work.wait()
        c = bucket.owed.shape[1]
        mine = bucket.owed[self.rank]
        parts = iter(bucket.received.split(1))
        total = torch.zeros_like(mine)
        for s in range(self.num_peers):  # in slot order, whoever sums
            total += mine if s == self.rank else self.codec.decode(next(parts), c)[0]
        encoded = self.codec.encode(total.unsqueeze(0))
        mine.copy_(total - self.codec.decode(encoded, c)[0])
        everything = encoded.new_empty((self.num_peers, encoded.shape[1]))
        self.peers._allgather_base(everything.view(-1), encoded.view(-1)).wait()
        self.num_bytes += encoded.numel()
        delta.assign(bucket.start, self.codec.decode(everything, c).view(-1)[: bucket.size])
        residual.assign(bucket.start, bucket.owed.view(-1)[: bucket.size])


@dataclass(frozen=True)
class _Bucket:
    start: int
    size: int
    owed: Tensor  # (S, c): v, and, once sent, what is still owed of it
    sent: Tensor  # kept alive until the exchange is over
    received: Tensor
    work: Any
