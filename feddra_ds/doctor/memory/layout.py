"""Sizes of what a rank holds, by ZeRO stage and precision: the arrays that the engine will make, without making them.

Legend: W ranks of a slot, b bytes of a working weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from feddra_ds.common.tree import get_path
from feddra_ds.config.schema import Config
from feddra_ds.doctor.memory.ledger import Blocks, blocks
from feddra_ds.engine.optimizer import parameter_groups
from feddra_ds.model import lora, lora_options
from feddra_ds.model.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Layout:
    """Counts and precisions of one rank. Elements of whole parameters; `groups` of the optimizer's groups by part."""

    device: str
    dtype: torch.dtype
    zero_stage: int
    ranks: int
    clients: int
    every: tuple[int, ...]  # elements of each parameter, frozen ones too
    aligner: tuple[int, ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    moved: tuple[int, ...]  # elements of each frozen weight that the server moves
    offloads_optimizer: bool
    offloads_weights: bool

    @staticmethod
    def of(config: Config, model: DualEncoder, ranks: int, clients: int, device: str) -> Layout:
        """The layout that the engine will make of a model on the meta device."""
        zero = config.deepspeed.get("zero_optimization") or {}
        stage = int(zero.get("stage") or 0)
        low = {"bf16.enabled": torch.bfloat16, "fp16.enabled": torch.float16}
        dtype = next((t for key, t in low.items() if get_path(config.deepspeed, key)), torch.float32)
        adapter = lora_options.parse(config.model.adapter)
        alternates = adapter is not None and adapter.aggregation == "alternate"
        decay = (config.optimizer.weight_decay, config.optimizer.decay_all)
        groups = parameter_groups(model, *decay, factors_apart=alternates)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        under = [lora.frozen_weight(a) for a, _ in lora.pairs(list(sizes))]
        return Layout(
            device,
            dtype,
            stage,
            ranks,
            clients,
            tuple(p.numel() for p in model.parameters()),
            tuple(p.numel() for p in model.aligner.parameters()),
            tuple((group["part"], tuple(p.numel() for p in group["params"])) for group in groups),
            tuple(sizes[name] for name in under) if adapter is not None and adapter.moves_frozen else (),
            stage > 0 and get_path(zero, "offload_optimizer.device") in ("cpu", "nvme"),
            stage == 3 and get_path(zero, "offload_param.device") in ("cpu", "nvme"),
        )

    @property
    def width(self) -> int:
        """b, bytes of a working weight."""
        return torch.empty(0, dtype=self.dtype).element_size()

    @property
    def total(self) -> int:
        return sum(self.every)

    @cached_property
    def trained(self) -> int:
        return sum(sum(sizes) for _, sizes in self.groups)

    def each(self, parts: Iterable[str], width: int) -> Blocks:
        """A block per trained parameter of some parts."""
        wanted = set(parts)
        return blocks(n * width for part, sizes in self.groups if part in wanted for n in sizes)

    def flat(self, parts: Iterable[str], width: int) -> Blocks:
        """A block per optimizer group of some parts, this rank's share."""
        wanted = set(parts)
        return blocks(math.ceil(sum(sizes) / self.ranks) * width for part, sizes in self.groups if part in wanted)

    def state(self, parts: Iterable[str], width: int = 4) -> Blocks:
        """A copy shaped like the masters: this rank's slices with ZeRO, whole parameters without."""
        return self.flat(parts, width) if self.zero_stage else self.each(parts, width)

    def moved_frozen(self) -> Blocks:
        """fp32 of the frozen weights that the server moves: this rank's shares with ZeRO, the whole without."""
        return blocks(4 * (math.ceil(n / self.ranks) if self.zero_stage else n) for n in self.moved)

    @property
    def largest_group(self) -> int:
        return max((sum(sizes) for _, sizes in self.groups), default=0)
