"""Nothing runs that came as a model: folders and hub ids that bring code or pickles are refused before anything opens them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feddra_ds.common.parse import parse_json, shown
from feddra_ds.common.text import first_line

SAFELY: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}  # for every from_pretrained of weights
# What transformers reads to decide which classes to make: any of them may name code.
_ABOUT = (
    "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "generation_config.json",
)  # fmt: skip
_OF_HUB = ("config.json", "tokenizer_config.json")  # all that the loaders here let transformers read of a hub id
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_code(source: str | Path, key: str) -> None:
    """Raise ValueError, one line that starts with `key`, where a model's folder or hub id names code to be run (auto_map), or
    its json files cannot be read. Nothing of it is run to find out."""
    for name in _ABOUT if Path(source).is_dir() else _OF_HUB:
        content = _read(source, name, key)
        for field, value in _fields(content):
            if field == "auto_map" and value:
                raise ValueError(f"{key}: {source} brings code of its own (auto_map in {name}), which is never run here; remove "
                                 "auto_map and the .py files if transformers has the class itself")  # fmt: skip
            if field.endswith("attn_implementation") and isinstance(value, str) and ("/" in value or ":" in value):
                raise ValueError(f"{key}: {source} names code of its own (attn_implementation {shown(value)} in {name}), which "
                                 "is never run here; remove it")  # fmt: skip


def refuse_pickles(source: str | Path, key: str) -> None:
    """Raise ValueError, one line that starts with `key`, where the weights are not in safetensors files: a pickle can run
    code when it is read."""
    if _read(source, _ADAPTER, key):
        raise ValueError(f"{key}: {source} is an adapter ({_ADAPTER}), not a model; merge it into its base model")
    index = _read(source, _INDEX, key)
    if index:
        places = index.get("weight_map")
        files = (
            set(places.values())
            if isinstance(places, dict) and all(isinstance(p, str) for p in places.values())
            else {""}
        )
        if wrong := sorted(f for f in files if "/" in f or "\\" in f or not f.endswith(".safetensors")):
            raise ValueError(
                f"{key}: {source}: {_INDEX} names {shown(wrong[0])}, which is no safetensors file beside it"
            )
    if index or _path(source, _WEIGHTS, key) is not None:
        return
    folder = Path(source)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in _PICKLES) if folder.is_dir() else []
    if pickles or not folder.is_dir():
        name = pickles[0] if pickles else "pytorch_model.bin"
        raise ValueError(f"{key}: {source} has no {_WEIGHTS}, and a pickle, such as {name}, is never opened, as it can run "
                         f"code; where you trust it, convert it: safetensors.torch.save_file(torch.load('{name}', "
                         f"weights_only=True), '{_WEIGHTS}')")  # fmt: skip


def _path(source: str | Path, name: str, key: str) -> Path | None:
    """A file of a folder or hub id; None where it has none."""
    path = Path(source) / name
    if not Path(source).is_dir():
        fetched = _fetched(str(source), name, key)
        return Path(fetched) if fetched else None
    return path if path.is_file() else None


def _read(source: str | Path, name: str, key: str) -> dict[str, Any]:
    """A json file of a folder or hub id; {} where it has none."""
    path = _path(source, name, key)
    if path is None:
        return {}
    try:
        content: Any = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {source}: {name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{key}: {source}: {name} must be an object, got {shown(content)}")
    return content


def _fetched(source: str, name: str, key: str) -> str | None:
    """A hub id's file, fetched where need be; None where it has none, or where the hub cannot be reached."""
    from transformers.utils import cached_file  # on demand: it is slow to import

    try:
        found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"{key}: {source} is not a folder here and could not be fetched from the Hugging Face hub: "
                         f"{first_line(error)}") from error  # fmt: skip
    return found


def _fields(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield from node.items()
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
