"""Encoders that stay whole, and a whole SigLIP, trained by real engines: ZeRO 3 on two ranks gives the weights of ZeRO 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BODY, largest_difference, metrics_of, on_ranks, run_all, tree, weights_of, zero

pytestmark = pytest.mark.slow


def convnext_and_t5(folder: Path) -> dict[str, Any]:
    maps = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_scale_init_value": 0.5}
    text = {"d_model": 32, "num_layers": 2, "d_kv": 16, "d_ff": 48, "num_heads": 2}
    return {
        "model__vision": {"config": {"model_type": "convnext", **maps, "initializer_range": 0.3}},
        "model__text": {"config": {"model_type": "t5", **text}},
        "model__num_top_blocks": 0,
        "model__num_extra_blocks": 1,
    }


def siglip(folder: Path) -> dict[str, Any]:
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import SiglipConfig, SiglipModel

    from feddra_ds.data.loading.tokens import load_tokenizer

    body = {k: v for k, v in BODY.items() if k != "initializer_range"}
    torch.manual_seed(3)
    tokenizer = load_tokenizer(None)
    text = {**body, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "projection_size": 32}
    model = SiglipModel(SiglipConfig(vision_config={**body, "image_size": 32, "patch_size": 8}, text_config=text))
    folder.mkdir()
    save_torch_state_dict({k: v.contiguous() for k, v in model.state_dict().items()}, folder)
    model.config.architectures = ["SiglipModel"]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model__pretrained": str(folder), "objective__name": "siglip", "objective__temperature": 0.1}


@pytest.mark.parametrize("make", [convnext_and_t5, siglip])
def test_zero_3_trains_what_zero_0_does(make: Any, dataset: Path, tmp_path: Path) -> None:
    changes = make(tmp_path / "weights") | {"optimizer__lr": 0.05, "clients__ids": ["north"]}
    changes |= {"schedule__rounds": 1, "schedule__stage1_steps": 1, "schedule__stage2_steps": 2}
    runs = []
    for stage, ranks in ((0, 1), (3, 2)):
        out = tmp_path / f"zero{stage}"
        config = tree(dataset, out, topology__ranks_per_slot=ranks, deepspeed=zero(stage), **changes)
        on_ranks(run_all, ranks, config, timeout=600)
        (line,) = metrics_of(out)
        assert all(np.isfinite(line["client_losses"]))
        assert not line["excluded_clients"]
        runs.append(weights_of(out, 0))
        assert (out / "model" / "model.safetensors").is_file()
    assert largest_difference(*runs) < 1e-4
    assert any(name.startswith("backbone.text") for name in runs[0])
