"""What an objective keeps of each training pair of a client, from batch to batch and over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from feddra_ds.data.format.samples import text_id


class Pairs:
    """Objective.num_kept numbers a pair, equal on every rank of the client's slot; NaN for pairs that were never met."""

    def __init__(self, num_kept: int):
        self.num_kept = num_kept
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def ids(keys: Sequence[str]) -> Tensor:
        """(n,) int64: what stands for samples' keys, everywhere and for ever."""
        return torch.tensor([text_id(key) for key in keys], dtype=torch.int64)

    def of(self, keys: Sequence[str]) -> Tensor:
        """(n, num_kept) fp32 on the host."""
        never = torch.full((self.num_kept,), torch.nan)
        return torch.stack([self._kept.get(number, never) for number in self.ids(keys).tolist()])

    def keep(self, ids: Tensor, values: Tensor) -> None:
        """values: (n, num_kept), of pairs (n,)."""
        rows = values.detach().float().cpu().unbind()
        self._kept.update(zip(ids.tolist(), rows, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """A copy for a safetensors file: ids (n,), in their order, and values (n, num_kept)."""
        ids = torch.tensor(sorted(self._kept), dtype=torch.int64)
        values = torch.stack([self._kept[i] for i in ids.tolist()]) if len(ids) else torch.zeros(0, self.num_kept)
        return {"ids": ids, "values": values}

    def load(self, path: Path) -> None:
        """Take what a file of `tensors` holds."""
        saved = load_file(path)
        self.keep(saved["ids"], saved["values"])
