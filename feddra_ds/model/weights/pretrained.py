"""Pretrained weights within a `defer`: names and shapes now, each tensor from its file when it is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from feddra_ds.common.trust import commit_of
from feddra_ds.model.weights.deferred import Recorder
from feddra_ds.model.weights.tape import CannotDefer
from feddra_ds.model.weights.tensor_files import all_stored


def load_deferred(
    recorder: Recorder, source: str, architecture: Any, config: PreTrainedConfig, attention: dict[str, str]
) -> PreTrainedModel:
    """The model of a folder or hub id, fp32, within a `defer`: transformers maps names and shapes, the files are read later.

    Raises CannotDefer where the weights are not in safetensors files, and what transformers raises.
    """
    if isinstance(architecture, (tuple, list)):
        raise CannotDefer(f"a {config.model_type} model may be one of several classes")
    tensors = {
        name: recorder.from_file(tensor.read, tensor.shape, tensor.dtype)
        for name, tensor in all_stored(_weight_files(source)).items()
    }
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads would not be recorded
    try:
        options: dict[str, Any] = {
            "dtype": torch.float32,
            "use_safetensors": True,
            "trust_remote_code": False,
            **attention,
        }
        model = architecture.from_pretrained(None, config=config, state_dict=tensors, **options)
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
    model.config.name_or_path = source
    return model


def _weight_files(source: str) -> list[str]:
    """The safetensors files of a folder or hub id, fetched where need be. Raises CannotDefer where it has others."""
    quietly: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if not Path(source).is_dir():
        quietly["revision"] = commit_of(source)
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **quietly)
    if whole is not None:
        return [whole]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **quietly)
    if index is None:
        raise CannotDefer(f"{source} has no safetensors weights; convert them, to read them tensor by tensor")
    return get_checkpoint_shard_files(source, index, revision=quietly.get("revision"))[0]


def folder_of_pickles(source: str) -> str:
    """The folder with a folder's or hub id's pickled weights, fetched where need be. Of a folder transformers takes what is
    there; for a hub id it would also have a service of the hub convert them."""
    if Path(source).is_dir():
        return source
    return snapshot_download(source, revision=commit_of(source), allow_patterns=["config.json", "pytorch_model*.bin*"])
