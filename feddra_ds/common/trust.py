"""Nothing runs that came as a model: folders and hub ids that bring code or pickles are refused before anything opens them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from feddra_ds.common.parse import parse_json
from feddra_ds.common.text import shown

# The files from which transformers chooses the classes of a model, a tokenizer and a processor: any may name code.
OF_MODEL = ("config.json",)
OF_TOKENIZER = (*OF_MODEL, "tokenizer_config.json")
OF_PROCESSOR = (
    *OF_TOKENIZER, "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"


def safely(source: str | Path) -> dict[str, Any]:
    """Arguments for every from_pretrained: no code of its own, nothing asked on the terminal, and a hub id's files of one
    commit, which is asked for once in a process; what is cached of it is then read without the network."""
    return {"trust_remote_code": False, "revision": None if Path(source).is_dir() else commit_of(str(source))}


@functools.lru_cache(maxsize=64)
def commit_of(hub_id: str) -> str | None:
    """A hub id's newest commit, or the cached one where the hub cannot be reached; None where neither is known."""
    from transformers.utils.hub import resolve_revision  # on demand: it is slow to import

    commit: str | None = resolve_revision(hub_id)
    return commit


def refuse_code(source: str | Path, key: str, files: Sequence[str] = OF_MODEL) -> None:
    """Raise ValueError, one line that starts with `key`, where those files of a folder or hub id name code to be run, or
    cannot be read. Nothing of it is run to find out."""
    for name in files:
        for field, value in _fields(_read(source, name, key)):
            if field == "auto_map" and value:
                raise ValueError(
                    f"{key}: {source} brings code of its own (auto_map in {name}), which is never run here; where transformers "
                    "has the class itself, give a folder with a copy of it without auto_map and without the .py files"
                )
            if field.endswith("attn_implementation") and isinstance(value, str) and ("/" in value or ":" in value):
                raise ValueError(
                    f"{key}: {source} names code of its own (attn_implementation {shown(value)} in {name}), which is never "
                    "run here; give a folder with a copy of it without that"
                )


def find_weights(source: str | Path, key: str, pickled: bool = False) -> tuple[Path, bool]:
    """(folder, are they pickles): where the weights of a folder or hub id are here, fetched where need be.

    Raises ValueError, one line that starts with `key`, where there are none in safetensors files and pickles are not
    permitted (pickled): a pickle can run code when it is read. Likewise for an adapter, and for files elsewhere.
    """
    place = next((path for name in (_WEIGHTS, _INDEX, *_PICKLES) if (path := _path(source, name))), None)
    if place is None:
        where = "" if Path(source).is_dir() else ", or it could not be fetched"
        raise ValueError(f"{key}: cannot load {source}: it has no {_WEIGHTS}{where}")
    folder, name = place.parent, place.name
    if (folder / _ADAPTER).is_file():
        raise ValueError(f"{key}: {source} is an adapter ({_ADAPTER}), not a model; merge it into its base model")
    named = _read(folder, "config.json", key).get("transformers_weights")
    if named is not None and named not in (_WEIGHTS, _INDEX):
        raise ValueError(
            f"{key}: {source}: config.json names the weights {shown(named)}; call them {_WEIGHTS} and remove that"
        )
    if name in _PICKLES and not pickled:
        raise ValueError(
            f"{key}: the weights of {source} are a pickle ({name}), not {_WEIGHTS}, and a pickle can run code when it is read; "
            "where you trust it, set model.pickled_weights to true (torch then reads it with weights_only=True), or convert it "
            "to safetensors"
        )
    if name.endswith(".json"):
        _check_index(folder, name, key)
        if not Path(source).is_dir():
            from transformers.utils.hub import get_checkpoint_shard_files

            get_checkpoint_shard_files(str(source), str(place), revision=commit_of(str(source)))
    return folder, name in _PICKLES


def _check_index(folder: Path, name: str, key: str) -> None:
    """Raise ValueError where an index of weights names files of another kind, or not beside it."""
    suffix = ".safetensors" if name == _INDEX else ".bin"
    places = _read(folder, name, key).get("weight_map")
    for file in places.values() if isinstance(places, dict) else [places]:
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(suffix):
            raise ValueError(f"{key}: {folder}: {name} names {shown(file)}, which is no {suffix} file beside it")


def _path(source: str | Path, name: str) -> Path | None:
    """A file of a folder or hub id, fetched where need be; None where it has none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            str(source), name, revision=commit_of(str(source)), _raise_exceptions_for_missing_entries=False
        )
    except Exception:  # transformers and the hub raise many types for "not there", and loading it will say which
        return None
    return Path(found) if found else None


def _read(source: str | Path, name: str, key: str) -> dict[str, Any]:
    """A json file of a folder or hub id; {} where it has none."""
    path = _path(source, name)
    if path is None:
        return {}
    try:
        content: Any = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: cannot load {source}: {name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{key}: cannot load {source}: {name} must be an object, got {shown(content)}")
    return content


def _fields(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield from node.items()
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
