"""LoRA on the backbones, through peft: what trains, what travels, how factors are averaged, merging.

The alignment module stays fully trained. The stages become: alignment module; alignment module + adapters. The
backbone's own weights are frozen and equal everywhere, so only parameters with `requires_grad` travel and are saved,
and with them the frozen weights that the server moves.

A layer computes W x + s B A x with A (r, in), B (out, r), s = alpha / r. What a server wants is the mean update
Σ pᵢ Bᵢ Aᵢ, and the rules differ in how they come to it:

- factors: A ← Σ pᵢ Aᵢ, B ← Σ pᵢ Bᵢ. The plain average; wrong by the covariance of Aᵢ and Bᵢ over the clients.
- product: the best rank-r factors of the mean update, by SVD. Wrong by the singular values behind the r-th.
- freeze_a: A is drawn once from its name and never trained, only B travels. Exact, half the bytes, fewer freedoms.
- residual (FedEx-LoRA, arXiv 2410.09432): as factors, and W ← W + s (Σ pᵢ Bᵢ Aᵢ − B A) takes what they lack. Exact.
- alternate (RoLoRA, arXiv 2409.02346): B trains in one round, A in the next, and the other is equal on all clients.
  Exact, half the bytes.
- stack (FLoRA, arXiv 2409.05976): W ← W + s Σ pᵢ Bᵢ Aᵢ, then B ← 0 and A is drawn anew. Exact, with a rank for each client.

docs/adapters.md compares them.

Legend: r rank, N clients, in and out the sizes of a layer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from feddra_ds.model import SIDES
from feddra_ds.model.lora_options import FactorName, LoraOptions

if TYPE_CHECKING:
    from feddra_ds.model.dual_encoder import DualEncoder

_ADAPTER = "default"  # peft's name of the one adapter
_A, _B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


class Factors(NamedTuple):
    """The two factors of one layer's update."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(out, r)"""


def apply(model: DualEncoder, options: LoraOptions | None) -> None:
    """Freeze the backbone and put adapters on its blocks, in place; nothing with None.

    The adapted model computes what the plain one does (B = 0). A is drawn from a layer's name, so it is the same on
    every rank, after every restart, and in an export. Its rank is that of the client which has most. Raises ValueError
    naming `model.adapter.target_modules`.
    """
    if options is None:
        return
    from peft import LoraConfig, inject_adapter_in_model  # on demand: slow to import

    model.backbone.requires_grad_(False)
    found = {side: targets(model, side, options.target_modules) for side in SIDES}
    if not any(found.values()):
        layers = sorted({name.rsplit(".", 1)[-1] for side in SIDES for name in targets(model, side, None)})
        raise ValueError(f"model.adapter.target_modules: {options.target_modules} name no layer; there are {layers}")
    for side, names in found.items():
        if names:
            rank = options.largest_rank
            config = LoraConfig(
                r=rank,
                lora_alpha=options.scale * rank,  # type: ignore[arg-type]
                lora_dropout=options.dropout,
                target_modules=names,
            )
            inject_adapter_in_model(config, getattr(model.backbone, side), _ADAPTER)
    for name, parameter in model.backbone.named_parameters():
        if name.endswith(_A):
            if not parameter.is_meta:
                with torch.no_grad():
                    parameter.copy_(draw(name, parameter.shape))
            parameter.requires_grad_(options.aggregation != "freeze_a")


def targets(model: DualEncoder, side: str, wanted: Sequence[str] | None) -> list[str]:
    """Names of the Linear layers in the backbone's blocks of one encoder, or in all of it where it stays whole; with
    `wanted`, those that end with one of them."""
    encoder, blocks = getattr(model.backbone, side), model.backbone.layouts[side].blocks
    within = "" if blocks is None else f"{blocks}."
    names = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and n.startswith(within)]
    return [n for n in names if wanted is None or any(f".{n}".endswith(f".{w}") for w in wanted)]


def draw(name: str, shape: Sequence[int], times: int = 0) -> Tensor:
    """A of the parameter `name`, fp32, as it is drawn at first (0), or after so many rounds of the rule stack."""
    text = name if times == 0 else f"{name} {times}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    bound = 1 / math.sqrt(shape[1])  # peft's own: kaiming uniform with a = √5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(name of A, name of B) of every adapted layer among parameter names."""
    have = set(names)
    return [(n, n[: -len(_A)] + _B) for n in names if n.endswith(_A) and n[: -len(_A)] + _B in have]


def frozen_weight(a: str) -> str:
    """Name of the frozen weight under the adapter whose A has this name."""
    return f"{a[: -len(_A)]}.base_layer.weight"


def factor_of(name: str) -> FactorName | None:
    """Which factor a parameter is, or None."""
    return "a" if name.endswith(_A) else "b" if name.endswith(_B) else None


# ---- averaging
def average_product(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The rank-r factors nearest to Σ pᵢ Bᵢ Aᵢ, in fp32; the out × in matrix is never formed.

    A gets orthogonal rows of one length and B takes the singular values, so that a direction without any update keeps
    A ≠ 0 and can still learn (with both factors 0 its gradients would stay 0). Where r is above `in`, in rows are all
    that there can be, and the others are 0.
    """
    rank, num_inputs = clients[0].a.shape
    left, core, right = mean_update(clients, weights)
    u, s, vh = torch.linalg.svd(core)
    length = sum(p * f.a.double().norm() for p, f in zip(weights, clients, strict=True)) / math.sqrt(rank)
    found, seen = min(rank, len(s)), min(rank, len(vh))
    a, b = torch.zeros(rank, num_inputs), torch.zeros(len(left), rank)
    a[:seen] = (length * (vh[:rank] @ right.T)).float()
    b[:, :found] = (left @ (u[:, :found] * s[:found]) / length).float()
    return Factors(a, b)


def mean_update(clients: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Σ pᵢ Bᵢ Aᵢ = left @ core @ rightᵀ in float64, left (out, k) and right (in, k) with orthonormal columns, k ≤ N r."""
    left, upper = torch.linalg.qr(torch.cat([p * f.b.double() for p, f in zip(weights, clients, strict=True)], dim=1))
    right, lower = torch.linalg.qr(torch.cat([f.a.double() for f in clients]).T)
    return left, upper @ lower.T, right


def rows_of_update(clients: Sequence[Factors], weights: Sequence[float], rows: slice) -> Tensor:
    """Some rows of Σ pᵢ Bᵢ Aᵢ, (rows, in) in float64."""
    left = torch.cat([p * f.b[rows].double() for p, f in zip(weights, clients, strict=True)], dim=1)
    return left @ torch.cat([f.a.double() for f in clients])


# ---- merging and saving
def layers(model: DualEncoder) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name in it, peft's layer) of every adapted layer."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, name = path.rpartition(".")
            yield model.get_submodule(parent), name, module


def adapted(model: DualEncoder) -> dict[str, float]:
    """The scale s of every adapted layer by its dotted name."""
    found = ((path, module) for path, module in model.named_modules() if hasattr(module, "lora_A"))
    return {path: module.scaling[_ADAPTER] for path, module in found if hasattr(module, "base_layer")}


def factors_of(layer: str) -> tuple[str, str]:
    """Names of the parameters A and B of an adapted layer."""
    return layer + _A, layer + _B


@torch.no_grad()
def merge(model: DualEncoder) -> DualEncoder:
    """W ← W + s B A in every adapted layer, and peft's layers taken out, in place. Same outputs, a plain DualEncoder."""
    for parent, name, layer in layers(model):
        layer.merge(safe_merge=False)
        setattr(parent, name, layer.get_base_layer())
    for side in SIDES:
        encoder = getattr(model.backbone, side)
        if hasattr(encoder, "peft_config"):
            del encoder.peft_config
    model.requires_grad_(True)
    return model


@torch.no_grad()
def stand_on(model: DualEncoder, weights: Mapping[str, Tensor]) -> None:
    """Put other frozen weights under adapters, by name, and give these a rank at which the model computes the same.

    Exact to the fp32 rounding of the weights: what is smaller is left out of a layer's rank.
    """
    for path, layer in list(model.named_modules()):
        name = f"{path}.base_layer.weight"
        if name not in weights:
            continue
        now, new = layer.base_layer.weight, weights[name]
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        update = now.double() - new + layer.scaling[_ADAPTER] * (b.double() @ a.double())
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        rounding = 4 * torch.finfo(now.dtype).eps * float(torch.linalg.matrix_norm(now.double()))
        tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # of what is left out behind a rank
        rank = max(1, int((tails > rounding).sum()))
        root = s[:rank].sqrt()
        now.copy_(new)
        layer.r[_ADAPTER] = layer.lora_alpha[_ADAPTER] = rank
        layer.scaling[_ADAPTER] = 1.0
        layer.lora_A[_ADAPTER].weight = nn.Parameter((root[:, None] * vh[:rank]).to(a.dtype))
        layer.lora_B[_ADAPTER].weight = nn.Parameter((u[:, :rank] * root).to(b.dtype))


def save_adapter(model: DualEncoder, out: str | Path, base: Mapping[str, str | None]) -> list[Path]:
    """Write each encoder's adapter in peft's format, out/vision and out/text, and the alignment module beside them.

    `PeftModel.from_pretrained(encoder, out/text)` puts it on a plain transformers encoder. base: the name or folder of
    the weights under each encoder. Returns the files. Raises ValueError where the model has no adapters.
    """
    if not any(True for _ in layers(model)):
        raise ValueError("this model has no adapters; set model.adapter, or export the whole model")
    files = []
    for side in SIDES:
        encoder, folder = getattr(model.backbone, side), Path(out) / side
        if not hasattr(encoder, "peft_config"):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        factors = {n: p for n, p in encoder.named_parameters() if n.endswith((_A, _B))}
        tensors = {
            f"base_model.model.{n.replace(f'.{_ADAPTER}', '')}": p.detach().contiguous() for n, p in factors.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = (
            encoder.peft_config[_ADAPTER].to_dict()
            | _ranks_of(encoder)
            | {
                "base_model_name_or_path": base.get(side),
                "inference_mode": True,
            }
        )
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
        files += [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    aligner = {f"aligner.{name}": tensor.contiguous() for name, tensor in model.aligner.state_dict().items()}
    save_file(aligner, Path(out) / "aligner.safetensors", metadata={"format": "pt"})
    return [*files, Path(out) / "aligner.safetensors"]


def _ranks_of(encoder: nn.Module) -> dict[str, Any]:
    """peft's keys for the rank and the scale of each adapted layer: one of all, or by name."""
    layers = {path: m for path, m in encoder.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    ranks = {path: layer.r[_ADAPTER] for path, layer in layers.items()}
    alphas = {path: layer.scaling[_ADAPTER] * layer.r[_ADAPTER] for path, layer in layers.items()}
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        return {"r": next(iter(ranks.values())), "lora_alpha": next(iter(alphas.values()))}
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
