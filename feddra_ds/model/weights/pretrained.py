"""Pretrained weights within a `defer`: names and shapes now, each tensor from its file when it is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from feddra_ds.model.weights.deferred import Recorder
from feddra_ds.model.weights.tape import CannotDefer
from feddra_ds.model.weights.tensor_files import all_stored


def load_deferred(
    recorder: Recorder, folder: Path, architecture: Any, config: PreTrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """The model of a folder, fp32, within a `defer`: transformers maps names and shapes, the files are read later.

    Raises CannotDefer where the weights are not in safetensors files, and what transformers raises.
    """
    if isinstance(architecture, (tuple, list)):
        raise CannotDefer(f"a {config.model_type} model may be one of several classes")
    tensors = {
        name: recorder.from_file(tensor.read, tensor.shape, tensor.dtype)
        for name, tensor in all_stored(_weight_files(folder)).items()
    }
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads would not be recorded
    try:
        return architecture.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32, **options)
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files of a folder. Raises CannotDefer where it has others."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [str(folder / SAFE_WEIGHTS_NAME)]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise CannotDefer(f"{folder} has no safetensors weights; convert them, to read them tensor by tensor")
    return get_checkpoint_shard_files(str(folder), str(index))[0]
