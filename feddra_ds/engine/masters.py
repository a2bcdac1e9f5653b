"""Where DeepSpeed keeps the fp32 master weights, per ZeRO stage and precision: its private names, all in this file.

A *slice* is one flat fp32 tensor of masters on this rank; its *fragments* say which elements of which parameters it
holds. Peers of equal slot_rank hold equal slices, so slices can be averaged element by element; fragments leave the
padding out and let a slice be saved, hashed and loaded at any number of ranks. Tested against the pinned version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of the flattened parameter `name` lie at [offset, offset + length) of a slice."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Slice:
    """One flat fp32 tensor of masters: `group` is the index of its optimizer group; `parameters` names all that the slices
    of this place hold over the slot's ranks, in one order, and is empty where every rank holds whole ones."""

    tensor: Tensor
    group: int
    fragments: tuple[Fragment, ...]
    parameters: tuple[str, ...] = ()

    def views(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Each fragment with its elements, flat, sharing memory with the slice."""
        flat = self.tensor.detach().view(-1)
        for fragment in self.fragments:
            yield fragment, flat.narrow(0, fragment.offset, fragment.length)


@dataclass(frozen=True)
class Masters:
    """The slices of this rank, and how to copy them into the weights that the forward uses."""

    slices: list[Slice]
    refresh: Callable[[], None]


def find_masters(engine: Any, module: nn.Module, slot_rank: int, ranks_per_slot: int) -> Masters:
    """The masters behind a DeepSpeedEngine. Raises RuntimeError on an optimizer class that was never tried."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Optimizer) and kind != "DeepSpeedCPUAdam":
        return _plain(optimizer, names)
    readers = {
        "FP16_UnfusedOptimizer": lambda: _unfused(optimizer, names),
        "FP16_Optimizer": lambda: _fused(optimizer, names),
        "DeepSpeedZeroOptimizer": lambda: _flat_partitions(
            optimizer,
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            names,
            slot_rank,
        ),
        "BF16_Optimizer": lambda: _flat_partitions(
            optimizer, optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, None, names, slot_rank
        ),
        "DeepSpeedZeroOptimizer_Stage3": lambda: _stage3(optimizer, names, slot_rank, ranks_per_slot),
    }
    if kind not in readers:
        raise RuntimeError(
            f"deepspeed built a {kind}, whose master weights feddra_ds does not know; "
            f"use a ZeRO stage and precision that gives one of {', '.join(readers)}"
        )
    return readers[kind]()


def _plain(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Masters:
    """ZeRO 0, fp32: the module's own tensors."""
    slices = [
        Slice(p.data, g, (Fragment(names[id(p)], 0, p.numel(), 0),))
        for g, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    ]
    return Masters(slices, lambda: None)


def _unfused(optimizer: Any, names: dict[int, str]) -> Masters:
    """ZeRO 0, bf16 or fp16, torch's AdamW: one fp32 copy per parameter."""
    pairs = [
        (g, low, master)
        for g, (lows, masters) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))
        for low, master in zip(lows, masters, strict=True)
    ]
    slices = [Slice(m.data, g, (Fragment(names[id(low)], 0, low.numel(), 0),)) for g, low, m in pairs]

    def refresh() -> None:
        for _, low, master in pairs:
            low.data.copy_(master.data)

    return Masters(slices, refresh)


def _fused(optimizer: Any, names: dict[int, str]) -> Masters:
    """ZeRO 0, bf16 or fp16, DeepSpeed's AdamW: one flat fp32 tensor per group."""
    slices = []
    for g, (lows, flat) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)):
        fragments, offset = [], 0
        for low in lows:
            fragments.append(Fragment(names[id(low)], 0, low.numel(), offset))
            offset += low.numel()
        slices.append(Slice(flat.data, g, tuple(fragments)))

    def refresh() -> None:
        for lows, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for low in lows:
                low.data.copy_(flat.data.narrow(0, offset, low.numel()).view_as(low))
                offset += low.numel()

    return Masters(slices, refresh)


def _flat_partitions(
    optimizer: Any,
    flats: list[Tensor],
    groups: list[list[Tensor]],
    offsets: list[list[int]] | None,
    names: dict[int, str],
    slot_rank: int,
) -> Masters:
    """ZeRO 1 and 2: each group is flattened, padded at places, and cut into equal partitions."""
    slices = []
    for g, (flat, parameters) in enumerate(zip(flats, groups, strict=True)):
        low, high = slot_rank * flat.numel(), (slot_rank + 1) * flat.numel()
        fragments, begin = [], 0
        for j, parameter in enumerate(parameters):
            begin = offsets[g][j] if offsets is not None else begin
            first, last = max(begin, low), min(begin + parameter.numel(), high)
            if first < last:
                fragments.append(Fragment(names[id(parameter)], first - begin, last - first, first - low))
            begin += parameter.numel()
        slices.append(Slice(flat.data, g, tuple(fragments), tuple(names[id(p)] for p in parameters)))
    return Masters(slices, optimizer.update_lp_params)


def _stage3(optimizer: Any, names: dict[int, str], slot_rank: int, ranks_per_slot: int) -> Masters:
    """ZeRO 3: each parameter is cut into ceil(n / W) chunks; a sub-group's flat tensor joins this rank's chunks."""
    slices = []
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        fragments, offset = [], 0
        for parameter in optimizer.fp16_groups[i]:
            chunk = -(-parameter.ds_numel // ranks_per_slot)
            start = min(slot_rank * chunk, parameter.ds_numel)
            length = min(chunk, parameter.ds_numel - start)
            if length > 0:
                fragments.append(Fragment(names[id(parameter)], start, length, offset))
            offset += parameter.partition_numel()
        held = tuple(names[id(parameter)] for parameter in optimizer.fp16_groups[i])
        slices.append(Slice(flat.data, optimizer.sub_group_to_group_id[i], tuple(fragments), held))

    def refresh() -> None:
        optimizer._partition_all_parameters()  # else weights gathered by an earlier forward stay stale
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    return Masters(slices, refresh)


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's whole gradient, summed over the slot's ranks as the optimizer will use it; None where it has none.

    Collective over the slot with ZeRO, in the same order of parameters on every rank.
    """
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def share_of(name: str, shape: Sequence[int], rank: int, num_shares: int) -> Slice:
    """A rank's share of a weight that no optimizer holds, on the host: the chunk that ZeRO 3 gives it of its parameters."""
    size = math.prod(shape)
    chunk = -(-size // num_shares)
    start = min(rank * chunk, size)
    length = min(chunk, size - start)
    return Slice(torch.zeros(chunk), -1, (Fragment(name, start, length, 0),))


@torch.no_grad()
def write_frozen(parameter: nn.Parameter, values: Tensor, slot_rank: int) -> None:
    """Write a parameter that no optimizer holds, from all its elements, flat; this rank's chunk of it with ZeRO 3."""
    stored = getattr(parameter, "ds_tensor", None)
    if stored is None:
        parameter.data.view(-1).copy_(values)
        return
    start = slot_rank * stored.ds_numel
    write_frozen_share(parameter, values[start : start + stored.ds_numel])


@torch.no_grad()
def write_frozen_share(parameter: nn.Parameter, values: Tensor) -> None:
    """Write this rank's chunk of a parameter that no optimizer holds, flat; ZeRO 3 only."""
    stored = parameter.ds_tensor  # type: ignore[attr-defined]
    assert stored.is_floating_point(), "a frozen parameter is kept quantised"
    stored.data.view(-1)[: len(values)].copy_(values)
