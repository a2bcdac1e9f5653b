"""The one DeepSpeed engine of a rank: build it, step it, read and write its fp32 masters.

The model has two parts, `aligner` and `backbone` (the prefixes of its parameter names), which are optimizer groups of
one engine, built once for the run. A part's weights travel as `PartState`: host copies of its slices. Frozen weights that
the server moves have slices too, `FROZEN`, which lie on the host and are no part: they are equal for all clients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from feddra_ds.common.tree import get_path
from feddra_ds.config.schema import Config
from feddra_ds.distributed.collectives import start_gather
from feddra_ds.engine.bootstrap import close_when_leaving, import_deepspeed, launched_as
from feddra_ds.engine.masters import (
    Fragment,
    Slice,
    find_masters,
    full_gradient,
    share_of,
    write_frozen,
    write_frozen_share,
)
from feddra_ds.engine.muon import MuonAndAdamW
from feddra_ds.engine.optimizer import (
    bucket_elements,
    build_optimizer,
    parameter_groups,
    pass_over_frozen_groups,
    reset_state,
    skip_bad_steps,
)
from feddra_ds.engine.parts import BUFFERS, FROZEN, PARTS, ModelState, PartState
from feddra_ds.model import lora, lora_options
from feddra_ds.model.lora_options import FactorName
from feddra_ds.model.weights.deferred import Weights, lay_out
from feddra_ds.model.weights.host_memory import returned_when_freed


class Engine:
    """A DeepSpeed engine over a dual encoder, seen as two parts of fp32 slices."""

    module: nn.Module  # the model, with hooks and partitions as its ZeRO stage puts them
    device: torch.device
    dtype: torch.dtype  # of the forward
    ranks_per_slot: int  # ranks of the slot
    num_micro_batches: int  # backward passes of one optimizer step

    @returned_when_freed()
    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        device: torch.device,
        slot_rank: int,
        ranks_per_slot: int,
        weights: Weights | None = None,
    ):
        """Build once per run, collectively over the slot. The model: fp32 on the host, equal on every rank.

        With weights the model is one that `weights.deferred.defer` built: its parameters are partitioned empty, and then come
        one by one, so that this rank never holds more than its share and one of them.
        """
        deepspeed = import_deepspeed(device)
        self.device, self.slot_rank, self.ranks_per_slot = device, slot_rank, ranks_per_slot
        ds_config = copy.deepcopy(config.deepspeed)
        self.dtype = _dtype(ds_config)
        self.zero_stage = int(get_path(ds_config, "zero_optimization.stage") or 0)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        self.adapter = lora_options.parse(config.model.adapter)
        frozen = self._lay_out_frozen()
        per_rank = max(1, config.data.batch_size // ranks_per_slot)
        micro_batch = min(per_rank, config.data.micro_batch_size or per_rank)
        self.num_micro_batches = -(-per_rank // micro_batch)
        if self.zero_stage > 0:
            num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            ds_config["zero_optimization"]["reduce_bucket_size"] = bucket_elements(ds_config, num_trained)
        ds_config |= {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": ds_config.get("gradient_clipping", 0.0),  # DeepSpeed's own default is 1.0
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        with launched_as(slot_rank, ranks_per_slot):
            if weights is not None:
                self._lay_out(model, weights, ds_config)
                initial = {}
            else:
                kept = {fragment.name for one in frozen for fragment in one.fragments}
                named = model.named_parameters()
                initial = {name: p.detach().clone() for name, p in named if p.requires_grad or name in kept}
            optimizer = pass_over_frozen_groups(build_optimizer(self._group(model, config), config, ds_config))
            if (
                self.zero_stage == 0 and self.dtype == torch.float32
            ):  # every other optimizer of DeepSpeed's looks itself
                skip_bad_steps(optimizer)
            self._ds, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=ds_config,
                dist_init_required=False,
            )
        close_when_leaving(self._ds)
        self.module = self._ds.module
        masters = find_masters(self._ds, self.module, slot_rank, ranks_per_slot)
        self._refresh = masters.refresh
        if isinstance(optimizer, MuonAndAdamW) and self.zero_stage > 0:
            optimizer.lay_out(masters.slices, self.shapes, dist.group.WORLD if ranks_per_slot > 1 else None)
        self._slices: dict[str, list[Slice]] = {
            part: [s for s in masters.slices if self._group_parts[s.group] == part] for part in PARTS
        }
        self._slices[FROZEN] = frozen
        # The cast to bf16 rounded the masters, and some optimizers take a step at construction: write what was meant.
        if weights is not None:
            self._fill(weights)
        else:
            read = lambda f: initial[f.name].reshape(-1)[f.start : f.start + f.length]
            self.load(read)
            self.load_frozen(read)
        self.reset_optimizer()

    def _group(self, model: nn.Module, config: Config) -> list[dict[str, Any]]:
        """The optimizer's groups; what each of them holds is kept by its index."""
        alternates = self.adapter is not None and self.adapter.aggregation == "alternate"
        options = config.optimizer
        matrices = model.matrix_parameter_names() if options.name == "muon" else ()  # type: ignore[operator]
        groups = parameter_groups(model, options.weight_decay, options.decay_all, matrices, factors_apart=alternates)
        self._group_parts: list[str] = [group["part"] for group in groups]
        self._group_factors: list[FactorName | None] = [group["factor"] for group in groups]
        self._group_parameters: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        return groups

    def _lay_out(self, model: nn.Module, weights: Weights, ds_config: dict[str, Any]) -> None:
        """Give a model of the meta device parameters without content: partitions of them with ZeRO 3."""
        partition = self._partitioner(ds_config) if self.zero_stage == 3 else None

        def make(parameter: nn.Parameter) -> nn.Parameter:
            # zeros: memory that nobody has written to yet costs the host nothing
            blank = torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
            made = nn.Parameter(blank, requires_grad=parameter.requires_grad)
            if partition is not None:
                partition(made)
            return made

        lay_out(model, weights, make, self.device)

    def _partitioner(self, ds_config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
        import deepspeed

        # zero.Init reads its options, and swaps torch's linear for one that keeps no gathered weight, for any module
        context = deepspeed.zero.Init(module=nn.Module(), dtype=self.dtype, config_dict_or_path=ds_config)

        def partition(parameter: nn.Parameter) -> None:
            context._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

        return partition

    def _fill(self, weights: Weights) -> None:
        """Write the weights one by one: into the masters, or where they are frozen into what the forward uses."""
        views: dict[str, list[tuple[Fragment, Tensor]]] = {}
        for part in (*PARTS, FROZEN):
            for fragment, view in self.views(part):
                views.setdefault(fragment.name, []).append((fragment, view))
        frozen = {name: p for name, p in self.module.named_parameters() if name in self._frozen}
        with torch.no_grad():
            for name, value in weights.stream(self.shapes):
                flat = value.view(-1)
                for fragment, view in views.get(name, ()):
                    view.copy_(flat[fragment.start : fragment.start + fragment.length])
                if name in frozen:
                    write_frozen(frozen[name], flat, self.slot_rank)
        weights.leave_generator()
        self._refresh()

    # ---- frozen weights that the server moves
    def _lay_out_frozen(self) -> list[Slice]:
        """This rank's shares of them, without content; without partitions every rank has the whole."""
        if self.adapter is None or not self.adapter.moves_frozen:
            return []
        shares, rank = (self.ranks_per_slot, self.slot_rank) if self.zero_stage > 0 else (1, 0)
        names = [lora.frozen_weight(a) for a, _ in lora.pairs(list(self.shapes))]
        return [share_of(name, self.shapes[name], rank, shares) for name in names]

    @torch.no_grad()
    def show_frozen(self) -> None:
        """Make the next forward use the slices `FROZEN` as they are now. Collective over the slot for ZeRO 1-3."""
        parameters = dict(self.module.named_parameters())
        for one in self._slices[FROZEN]:
            parameter, mine = parameters[one.fragments[0].name], one.tensor.to(self.device, self.dtype)
            if self.zero_stage == 3:
                write_frozen_share(parameter, mine[: one.fragments[0].length])
            else:
                if self.zero_stage > 0 and self.ranks_per_slot > 1:
                    slot = dist.group.WORLD  # for DeepSpeed too
                    assert slot is not None
                    mine, work = start_gather(mine, slot)
                    work.wait()
                write_frozen(parameter, mine[: parameter.numel()], self.slot_rank)
        if self._slices[FROZEN]:
            self._refresh()

    # ---- training
    def __call__(self, **batch: Any) -> Any:
        return self._ds(**batch)

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss whose gradients are this rank's, and this micro-batch's, additive share."""
        # DeepSpeed averages over ranks and micro-batches; the shares must be summed
        self._ds.backward(loss * (self.ranks_per_slot * self.num_micro_batches))

    def step(self) -> bool:
        """After the last micro-batch, the optimizer's step; whether it was taken.

        Where a gradient is not finite it is not: no weight and no moment changes, on any rank of the slot.
        """
        self._ds.step()
        return bool(self._ds.was_step_applied())

    def train(self, mode: bool = True) -> None:
        self._ds.train(mode)

    def set_learning_rates(self, rates: Mapping[str, float], resting: FactorName | None = None) -> None:
        """Learning rate of each part; 0 freezes it to the bit, weight decay included, and so does resting a factor of the
        adapters, where they lie apart.

        What is frozen beside what trains has no gradient: ZeRO 3 would clip by the one that it has kept of an earlier stage.
        """
        groups = zip(self._ds.optimizer.param_groups, self._group_parts, self._group_factors, strict=True)
        new = [0.0 if factor is not None and factor == resting else rates[part] for _, part, factor in groups]
        for group, parameters, rate in zip(self._ds.optimizer.param_groups, self._group_parameters, new, strict=True):
            group["lr"] = rate
            for parameter in parameters:
                parameter.requires_grad_(rate != 0 or not any(new))

    def holds(self, part: str, factor: FactorName | None) -> list[bool]:
        """Of each slice of a part, whether it holds this factor of the adapters; none does where they do not lie apart."""
        return [factor is not None and self._group_factors[s.group] == factor for s in self._slices[part]]

    def reset_optimizer(self) -> None:
        """Forget the moments and step counts, as at the start of each stage."""
        reset_state(self._ds)

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of each part's gradient, between backward and step; 0 for a part without one. Collective over the slot."""
        squares = dict.fromkeys(PARTS, 0.0)
        for name, parameter in self.module.named_parameters():
            gradient = full_gradient(parameter) if parameter.requires_grad else None
            if gradient is not None:
                squares[name.split(".")[0]] += float(gradient.double().square().sum())
        return {part: square**0.5 for part, square in squares.items()}

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters, which keep all of it alive; the groups must still be there."""
        self._ds.destroy()

    # ---- weights
    def slices(self, part: str) -> list[Tensor]:
        """The live fp32 masters of a part on this rank, flat, padding included; peers hold the same elements.

        `buffers` gives the model's persistent buffers, each flat, in their own dtypes.
        """
        if part == BUFFERS:
            return [buffer.view(-1) for buffer in self.buffers().values()]
        return [s.tensor.view(-1) for s in self._slices[part]]

    def snapshot(self, part: str) -> PartState:
        """Host copies of a part's slices."""
        return [s.detach().to("cpu", copy=True) for s in self.slices(part)]

    def state(self) -> ModelState:
        """Host copies of everything that makes the model: both parts and the buffers."""
        return {part: self.snapshot(part) for part in (*PARTS, BUFFERS)}

    def write(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Write parts into the masters and make the next forward use them. Collective over the slot for ZeRO 1-3."""
        with torch.no_grad():
            for part, tensors in states.items():
                for live, new in zip(self.slices(part), tensors, strict=True):
                    live.copy_(new)
        self._refresh()

    def refresh(self) -> None:
        """Make the next forward use the masters as they are now. Collective over the slot for ZeRO 1-3."""
        self._refresh()

    def views(self, part: str) -> Iterator[tuple[Fragment, Tensor]]:
        """Each fragment of a part with its elements (flat, live, no padding)."""
        for one in self._slices[part]:
            yield from one.views()

    def views_of(
        self, part: str, state: PartState, without: Sequence[bool] | None = None
    ) -> Iterator[tuple[Fragment, Tensor]]:
        """Each fragment of a part with its elements in a host state of that part, but those of slices that are left out."""
        for index, (one, tensor) in enumerate(zip(self._slices[part], state, strict=True)):
            for fragment in () if without is not None and without[index] else one.fragments:
                yield fragment, tensor.narrow(0, fragment.offset, fragment.length)

    def load(self, read: Any) -> None:
        """Write all parts from `read(fragment) -> flat fp32 tensor` and refresh."""
        with torch.no_grad():
            for part in PARTS:
                for fragment, view in self.views(part):
                    view.copy_(read(fragment))
        self._refresh()

    def load_frozen(self, read: Callable[[Fragment], Tensor]) -> None:
        """Write the frozen weights that the server moves from `read(fragment) -> flat fp32 tensor`, and show them."""
        for fragment, view in self.views(FROZEN):
            view.copy_(read(fragment))
        self.show_frozen()

    # ---- a second look at a part
    def copy_part(self, part: nn.Module, into: nn.Module) -> None:
        """Copy a submodule's working weights (gathered where ZeRO 3 partitions them) and buffers into a plain twin."""
        with self._gathered(part), torch.no_grad():
            sources = (*part.parameters(), *part.buffers())
            for target, source in zip((*into.parameters(), *into.buffers()), sources, strict=True):
                target.copy_(source)

    @contextmanager
    def _gathered(self, part: nn.Module) -> Iterator[None]:
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(part.parameters())):
            yield

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers by name, live."""
        persistent = set(self.module.state_dict().keys()) - set(self.shapes)
        return {name: b for name, b in self.module.named_buffers() if name in persistent}


def _dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    if get_path(dict(ds_config), "bf16.enabled"):
        return torch.bfloat16
    if get_path(dict(ds_config), "fp16.enabled"):
        return torch.float16
    return torch.float32
