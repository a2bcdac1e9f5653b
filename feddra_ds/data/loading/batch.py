"""A batch of image-text pairs: uint8 pixels, tokens, and what makes the model's input of them.

Legend: B pairs in a client's batch over all its ranks, b this rank's part of it, S side of the image, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass
class Batch:
    """One rank's part of a batch.

    pixels: (b, 3, S, S) uint8; `pixel_values` normalises them. input_ids, attention_mask: (b, T) int64, padded to the
    longest text of the part rounded up to 8. text_ids: (b,) int64, equal for equal reports. keys: b sample keys.
    mean, std: (3, 1, 1) float32 of the normalisation.
    """

    pixels: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    text_ids: torch.Tensor
    keys: list[str]
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def pixel_values(self) -> torch.Tensor:
        """(b, 3, S, S) float32, normalised; computed at each access, on the device that the pixels are on."""
        return self.pixels.float().mul_(1 / 255).sub_(self.mean).div_(self.std)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, part: slice) -> Batch:
        """A micro-batch: the same fields, sliced (views)."""
        return replace(self, **{name: getattr(self, name)[part] for name in _PER_PAIR})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device. The pixels travel as uint8, a quarter of their normalised size."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for copies that overlap with the device's work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "keys"}
        return replace(self, **changed)


_PER_PAIR = ("pixels", "input_ids", "attention_mask", "text_ids", "keys")
