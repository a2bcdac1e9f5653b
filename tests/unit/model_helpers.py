"""Tiny models for the tests of model code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import BertTokenizer, PreTrainedModel

from feddra_ds.config.schema import ModelConfig
from feddra_ds.model.build import build_model
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.objectives import ObjectiveOptions

BODY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {"model_type": "vit", "patch_size": 8, **BODY}
TEXT = {"model_type": "bert", **BODY}
SIZES: dict[str, int] = {"image_size": 32, "vocab_size": 60, "pad_token_id": 0, "max_text_length": 12}


def config(**values: Any) -> ModelConfig:
    head = {"hidden_dim": 48, **values.pop("head", {})}
    base = {"vision": {"config": VISION}, "text": {"config": TEXT}, "embedding_dim": 16, "head": head}
    return ModelConfig.model_validate(base | values)


def build(
    seed: int = 0, objective: dict[str, Any] | None = None, sizes: dict[str, int] | None = None, **values: Any
) -> DualEncoder:
    torch.manual_seed(seed)
    return build_model(config(**values), ObjectiveOptions.model_validate(objective or {}), **(SIZES | (sizes or {})))


def batch(size: int = 32, pairs: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (pairs, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[3, 2:] = 0
    return {
        "pixel_values": torch.randn(pairs, 3, size, size, generator=generator),
        "input_ids": ids * mask,
        "attention_mask": mask,
    }


def scramble(module: nn.Module, seed: int = 3) -> None:
    """Give every parameter, norms and biases too, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(0.5 + noise if "norm" in name.lower() and name.endswith("weight") else (noise - 0.5) * 0.4)


def save(model: PreTrainedModel, folder: Path) -> str:
    """save_pretrained, without the import of deepspeed that it costs."""
    folder.mkdir(parents=True)
    tied = model.all_tied_weights_keys or {}
    save_torch_state_dict({k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}, folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


def tokenizer() -> BertTokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
