"""A trained model as a folder that needs no DeepSpeed: safetensors, config.json and the processor's files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feddra_ds.common.text import first_line
from feddra_ds.common.trust import find_weights, safely
from feddra_ds.model.dual_encoder import DualEncoder, DualEncoderConfig, register
from feddra_ds.model.encoders import load_config, quiet
from feddra_ds.model.processor import DualEncoderProcessor
from feddra_ds.model.weights.tensor_files import Shape, write_shards

MAX_SHARD_SIZE = "5GB"


def save_model(
    state: Mapping[str, Tensor],
    config: DualEncoderConfig,
    processor: DualEncoderProcessor,
    out_dir: str | Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a model folder, whole or not at all: an old `out_dir` is replaced only when the new one is on disk.

    state: every parameter and persistent buffer by name, on the CPU. Raises ValueError where names or shapes are not
    those of the model that `config` describes.
    """
    return save_tensors(_shapes_of(state), state.__getitem__, config, processor, out_dir, max_shard_size=max_shard_size)


def save_tensors(
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    config: DualEncoderConfig,
    processor: DualEncoderProcessor,
    out_dir: str | Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """save_model where the tensors come one by one, from read(name): memory for one of them is needed."""
    _check_shapes(shapes, config)
    config.architectures = [DualEncoder.__name__]
    return _write_folder(shapes, read, config, processor, Path(out_dir), max_shard_size)


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: Shape(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def _check_shapes(shapes: Mapping[str, Shape], config: DualEncoderConfig) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in DualEncoder(config).state_dict().items()}
    got = {name: shape.size for name, shape in shapes.items()}
    if wanted != got:
        wrong = sorted(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n))
        shown = ", ".join(f"{n} (is {got.get(n, 'missing')}, should be {wanted.get(n, 'absent')})" for n in wrong[:3])
        raise ValueError(f"these weights are not the model's: {len(wrong)} names differ, {shown}")


def write_folder(
    state: Mapping[str, Tensor], config: Any, processor: DualEncoderProcessor, out: Path, max_shard_size: int | str
) -> Path:
    """Write weights, any transformers config and a processor as one folder, whole or not at all."""
    return _write_folder(_shapes_of(state), state.__getitem__, config, processor, out, max_shard_size)


def _write_folder(
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    config: Any,
    processor: DualEncoderProcessor,
    out: Path,
    max_shard_size: int | str,
) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_shards(shapes, read, partial, max_shard_size)
        config.dtype = next(shape.dtype for shape in shapes.values() if shape.dtype.is_floating_point)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.chmod(0o755)
        for path in [*partial.iterdir(), partial]:
            _fsync(path)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _replace(new: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)
    _fsync(out.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def load_pretrained(path: str | Path) -> tuple[DualEncoder, DualEncoderProcessor]:
    """The model (eval mode, CPU) and processor of a run directory, a run's `model/` or an export.

    `model(**processor(images=…, text=…, return_tensors="pt"))` has `.image_embeds` and `.text_embeds`, (B, D), unit
    norm. Needs no DeepSpeed. Raises ValueError naming what is missing.
    """
    register()
    folder = find_model(path)
    config = load_config(str(folder), "load_pretrained")
    if not isinstance(config, DualEncoderConfig):
        raise ValueError(f"{folder} holds a {config.model_type} model, not one exported by feddra-ds")
    find_weights(folder, "load_pretrained")
    try:
        with quiet():
            options = {"output_loading_info": True, "use_safetensors": True}
            model, info = DualEncoder.from_pretrained(folder, **options, **safely(folder))
    except Exception as error:  # missing, cut off or mismatched files: transformers and safetensors raise many types
        raise ValueError(f"{folder}: its weights cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{folder}: its weights lack {len(missing)} parameters, {missing[0]} among them")
    return model.eval(), DualEncoderProcessor.from_pretrained(folder)


def find_model(path: str | Path) -> Path:
    """The folder with config.json in a run directory, or `path` itself. Raises ValueError."""
    root = Path(path).expanduser()
    for folder in (root / "model", root):
        if (folder / "config.json").is_file():
            return folder
    own = sorted(str(found.parent) for found in (root / "model").glob("*/config.json"))
    if own:
        raise ValueError(f"{root} holds one model per client; give one of {', '.join(own)}")
    if (root / "checkpoints").is_dir():
        raise ValueError(f"{root} has no model/ yet; `feddra-ds export {root} --out DIR` writes its newest checkpoint")
    what = "has no config.json" if root.is_dir() else "does not exist"
    raise ValueError(f"{root} {what}; give a run directory, its model/ or an exported folder")
