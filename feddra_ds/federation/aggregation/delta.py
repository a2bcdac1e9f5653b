"""The mean by way of the deltas θ_i − θ_g, which travel encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, PartState
from feddra_ds.federation.aggregation.compression import CompressedSum, DeltaCodec
from feddra_ds.federation.aggregation.mean import WeightedSum
from feddra_ds.federation.aggregation.peers import BUCKET_ELEMENTS
from feddra_ds.model.lora_options import FactorName


class DeltaSum(WeightedSum):
    """The same mean by way of the deltas θ_i − θ_g, which travel encoded; buffers and padding stay exact.

    residuals: by part, fp32 host tensors like the slices; what rounding has kept of this slot's earlier deltas, in units
    of the mean. It is added to the delta and left behind anew. With one slot nothing travels and nothing is rounded.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Sequence[str],
        base: Mapping[str, PartState],
        codec: DeltaCodec,
        residuals: Mapping[str, PartState],
        resting: FactorName | None = None,
    ):
        super().__init__(engine, parts, base, resting)
        self.engine, self.codec, self.residuals = engine, codec, residuals

    def _add_part(self, part: str, weight: float, state: Sequence[Tensor]) -> None:
        if part == BUFFERS:
            super()._add_part(part, weight, state)
        elif weight != 0:
            for total, live, before in self._views(part, self.sums[part], state, self.base[part]):
                for piece, new, old in zip(*(x.split(BUCKET_ELEMENTS) for x in (total, live, before)), strict=True):
                    piece.add_(new.detach().to(piece.device) - old, alpha=weight)

    def _average_parts(self, parts: Sequence[str], topology: Topology, total_weight: float) -> None:
        pairs = [pair for part in parts for pair in self._views(part, self.sums[part], self.residuals[part])]
        deltas, residuals = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if total_weight != 1:
            for delta in deltas:
                delta.div_(total_weight)
        if topology.peers is None:
            for delta, residual in zip(deltas, residuals, strict=True):
                delta.add_(residual)
                residual.zero_()
        else:
            rank, size = topology.live_slots.index(topology.slot), len(topology.live_slots)
            exchange = CompressedSum(self.codec, topology.peers, rank, size, topology.device)
            exchange.run(deltas, residuals)
            self.num_bytes += exchange.num_bytes
        for part in parts:
            for total, before, rest in zip(self.sums[part], self.base[part], self.rests[part], strict=True):
                if not rest:
                    total.add_(before)  # padding has no delta

    def _views(self, part: str, *states: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """The elements of a part's fragments that travel, without padding, in each of several states of it."""
        without = self.rests[part]
        for views in zip(*(self.engine.views_of(part, list(state), without) for state in states), strict=True):
            yield tuple(values for _, values in views)
