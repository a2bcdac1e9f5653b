"""A checkpoint of a run as a model, or as a model folder, on one device and without deepspeed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from feddra_ds.checkpoint.format import SHARED, check, read_coordinator
from feddra_ds.checkpoint.load import SavedModel
from feddra_ds.common.errors import CheckpointError
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.model import lora
from feddra_ds.model.build import model_of, processor_of, tokenizer_of
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import MAX_SHARD_SIZE, save_model, save_tensors
from feddra_ds.model.processor import DualEncoderProcessor
from feddra_ds.model.weights.deferred import defer
from feddra_ds.model.weights.host_memory import returned_when_freed
from feddra_ds.model.weights.tensor_files import Shape


def load_checkpoint(folder: Path, owner: str = SHARED) -> tuple[DualEncoder, DualEncoderProcessor]:
    """The model (eval mode, fp32, CPU) that a checkpoint holds for `owner` (the global model, or a client's id).

    Built from the config in the checkpoint, adapters merged; what was frozen is built again from its weights or seed, but
    where the server moved it. Raises CheckpointError, and ConfigError or ValueError where the config no longer fits (a
    pretrained folder that has gone).
    """
    config, tokenizer, model, state = _read(folder, owner)
    model.load_state_dict(state, strict=False)
    return lora.merge(model).eval(), processor_of(config, tokenizer)


def load_adapters(folder: Path, owner: str = SHARED) -> DualEncoder:
    """As load_checkpoint, but with adapters over the frozen weights that the run began with: they hold all that it changed."""
    _, _, model, state = _read(folder, owner)
    began = {n: p.detach().clone() for n, p in model.named_parameters() if n in state and not p.requires_grad}
    model.load_state_dict(state, strict=False)
    lora.stand_on(model, began)
    return model.eval()


def _read(folder: Path, owner: str) -> tuple[Config, PreTrainedTokenizerBase, DualEncoder, dict[str, Tensor]]:
    """The config of a checkpoint, its tokenizer, a model as the run built it, and what is to be put into it."""
    config = _config_of(folder, owner)
    tokenizer = tokenizer_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = model_of(config, tokenizer)
    saved = SavedModel(folder, owner)
    state = saved.parameters() | saved.buffers()
    _compare(folder, model, set(state))
    return config, tokenizer, model, state


@returned_when_freed()
def export_checkpoint(
    folder: Path, owner: str, out_dir: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> Path:
    """Write the model that a checkpoint holds for `owner` as a model folder, adapters merged.

    Tensor by tensor: the host never holds the model, but where it cannot be deferred (weights/deferred.py). Raises what
    load_checkpoint and save_model raise.
    """
    config = _config_of(folder, owner)
    tokenizer = tokenizer_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model, frozen = defer(lambda: model_of(config, tokenizer))
    if frozen is None:
        del model
        whole, processor = load_checkpoint(folder, owner)
        return save_model(whole.state_dict(), whole.config, processor, out_dir, max_shard_size=max_shard_size)
    saved = SavedModel(folder, owner)
    buffers = saved.buffers()
    _compare(folder, model, {*saved.names, *buffers})
    adapted = lora.adapted(model)

    def stored(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        return saved.parameter(name) if name in saved.names else frozen.read(name)

    def read(name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if layer not in adapted:
            return stored(name)
        value = stored(f"{layer}.base_layer.{leaf}")
        if leaf == "weight":  # as `lora.merge` does
            a, b = (stored(factor) for factor in lora.factors_of(layer))
            value += (b @ a) * adapted[layer]
        return value

    plain = lora.merge(model)
    shapes = {name: Shape(tuple(t.shape), t.dtype) for name, t in plain.state_dict().items()}
    return save_tensors(
        shapes, read, plain.config, processor_of(config, tokenizer), out_dir, max_shard_size=max_shard_size
    )


def _config_of(folder: Path, owner: str) -> Config:
    problem = check(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")
    owners = sorted(path.name for path in (folder / "weights").iterdir())
    if owner not in owners:
        raise CheckpointError(f"{folder} holds no model of {owner}; it holds {', '.join(owners)}: use --client")
    return from_dict(read_coordinator(folder)["config"])


def _compare(folder: Path, model: DualEncoder, saved: set[str]) -> None:
    lost = {name for name, p in model.named_parameters() if p.requires_grad} - saved
    unknown = saved - model.state_dict().keys()
    if lost or unknown:
        raise CheckpointError(f"{folder} is of another model: {sorted(lost | unknown)[0]} is on one side only")
