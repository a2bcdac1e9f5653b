"""The alignment module θ: top blocks, extra blocks, pooling, projection heads, temperature, what the objective learns.

Every parameter is used inside the forward of the module that owns it, because ZeRO-3 gathers parameters by hooks on
those forwards.

Buffers. A BatchNorm, inside the head, at its output or in an encoder (ResNet), has `running_mean` and `running_var`
(floating: the server takes their weighted mean, so the averaged variance leaves out the spread between the clients'
means) and `num_batches_tracked` (integer: taken from the coordinator). It is the release's choice; LayerNorm has no
buffers and does not couple the samples of a batch.

Legend: B batch, T tokens or patches, H hidden size, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from feddra_ds.model.towers import TowerHidden, call_blocks

MIN_TEMPERATURE = 0.01


class Temperature(nn.Module):
    """τ of equation (1): fixed, or learned as log(τ / τ₀) of shape (1,).

    The parameter starts at 0, where bf16 is dense: log τ itself would round τ by 0.8 %. Below MIN_TEMPERATURE the
    value is held, with the gradient passed through so that it can come back.
    """

    def __init__(self, initial: float, learnable: bool):
        super().__init__()
        self.initial = float(initial)
        if learnable:
            self.log_ratio = nn.Parameter(torch.zeros(1))
        else:
            self.register_parameter("log_ratio", None)
            self.register_buffer("_placed", torch.empty(0), persistent=False)  # moves with the module; holds nothing

    def reset_parameters(self) -> None:
        if self.log_ratio is not None:
            nn.init.zeros_(self.log_ratio)

    def forward(self) -> Tensor:
        """τ as an fp32 tensor (1,), a constant where it is fixed. ZeRO 3 takes nothing but tensors from a module."""
        if self.log_ratio is None:
            return torch.full((1,), self.initial, device=self._placed.device)
        value = self.initial * self.log_ratio.float().exp()
        return value + (value.clamp(min=MIN_TEMPERATURE) - value).detach()


class Learned(nn.Module):
    """What an objective learns beside the model, by name: (shape, mean, standard deviation) of where each starts.

    The parameters are the differences from that mean: near 0 bf16 is dense.
    """

    def __init__(self, about: Mapping[str, Sequence[Any]]):
        super().__init__()
        self.starts, self.stds = {}, {}
        for name in sorted(about):  # a saved config has sorted them too
            shape, self.starts[name], self.stds[name] = about[name]
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if self.stds[name] > 0:
                nn.init.normal_(parameter, std=self.stds[name])
            else:
                nn.init.zeros_(parameter)

    def forward(self) -> tuple[Tensor, ...]:
        """Their values, fp32, in the order of their sorted names."""
        return tuple(self.starts[name] + parameter.float() for name, parameter in self.named_parameters(recurse=False))


class _Float32Statistics(nn.Module):
    """Running statistics that stay float32 where the module is cast: in bfloat16 their updates would round to nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self


class BatchNorm(_Float32Statistics, nn.BatchNorm1d):
    """nn.BatchNorm1d in float32 arithmetic, whatever the forward's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]
        assert self.momentum is not None
        out = F.batch_norm(
            x.float(), self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )
        return out.to(x.dtype)


class SyncBatchNorm(_Float32Statistics, nn.SyncBatchNorm):
    """The same over the ranks of torch's default group, those of a client; on CUDA alone."""


def own_batchnorms(module: nn.Module) -> bool:
    """Have the batchnorms of an encoder's feature maps keep `BatchNorm`'s rules, in place; whether it has any."""
    found = [child for child in module.modules() if type(child) is nn.BatchNorm2d]
    for child in found:
        # its parameters and buffers, and transformers' note that they are initialised, stay
        child.__class__ = BatchNorm  # type: ignore[assignment]
    return bool(found)


def synchronise_batchnorms(module: nn.Module) -> None:
    """Have every BatchNorm inside a module take its statistics over the client's ranks."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm):
                new = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
                new._parameters, new._buffers, new.training = child._parameters, child._buffers, child.training
                setattr(parent, name, new)


class Head(nn.Module):
    """Projection (B, H) → (B, D): `linear` is one Linear (without bias, if none is asked for), `mlp` is
    Linear-norm-ReLU-Linear.

    `output_norm` normalises what comes out, without a learned scale or shift.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kind: str,
        hidden_dim: int,
        norm: str,
        output_norm: str = "none",
        bias: bool = False,
    ):
        super().__init__()
        self.output_norm: nn.Module = nn.Identity()
        if output_norm == "layernorm":
            self.output_norm = nn.LayerNorm(out_dim, elementwise_affine=False)
        elif output_norm == "batchnorm":
            self.output_norm = BatchNorm(out_dim, affine=False)
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(in_dim, out_dim, bias=bias))
            return
        norms: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "batchnorm": BatchNorm}
        middle = [norms[norm](hidden_dim)] if norm in norms else []
        self.layers = nn.Sequential(nn.Linear(in_dim, hidden_dim), *middle, nn.ReLU(), nn.Linear(hidden_dim, out_dim))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.output_norm(self.layers(pooled))


class ExtraBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block, the release's extra depth on top of an encoder. (B, T, H) → (B, T, H)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        b, t, h = states.shape
        q, k, v = self.qkv(self.norm1(states)).view(b, t, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask.bool()[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        states = states + self.out(attended.transpose(1, 2).reshape(b, t, h))
        return states + self.down(F.gelu(self.up(self.norm2(states))))

    def reset_parameters(self) -> None:
        """Transformers' initialisation: weights normal with standard deviation 0.02, biases 0."""
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)


class TowerAligner(nn.Module):
    """One encoder's part of the alignment module: what its backbone hands over → embeddings."""

    def __init__(
        self,
        blocks: list[nn.Module],
        norm: nn.Module | None,
        pooler: nn.Module | None,
        head: Head,
        *,
        dim: int,
        heads: int,
        num_extra_blocks: int,
        pooling: str,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm if norm is not None else nn.Identity()
        self.extra = nn.ModuleList([ExtraBlock(dim, heads) for _ in range(num_extra_blocks)])
        self.extra_norm = nn.LayerNorm(dim) if num_extra_blocks else nn.Identity()
        self.pooler = pooler
        self.head = head
        self.pooling = pooling

    def forward(self, hidden: TowerHidden, with_tokens: bool = False) -> tuple[Tensor, Tensor | None]:
        """The pooled embedding (B, D), and with_tokens that of every token (B, T, D) by the same head; not normalised."""
        states = self.norm(call_blocks(list(self.blocks), hidden.states, hidden.calls))
        for block in self.extra:
            states = block(states, hidden.mask)
        states = self.extra_norm(states)
        pooled = self.pooler(states) if self.pooler is not None else pool(states, hidden.mask, self.pooling)
        tokens = self.head(states.flatten(0, 1)).unflatten(0, states.shape[:2]) if with_tokens else None
        return self.head(pooled), tokens


def pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """(B, T, H) → (B, H): `cls` the first token, `mean` over the tokens of `mask`, `last` the last token of `mask`."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        if mask is None:
            return states[:, -1]
        index = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), index]
    assert pooling == "mean", pooling
    if mask is None:
        return states.mean(dim=1)
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
