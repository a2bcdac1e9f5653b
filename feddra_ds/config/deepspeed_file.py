"""DeepSpeed's own JSON config, as people have it from other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feddra_ds.common.errors import ConfigError
from feddra_ds.common.parse import parse_json


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """The keys of a JSON file for the section `deepspeed`. What is "auto", which a trainer fills in, is left to feddra_ds.

    Raises ConfigError.
    """
    try:
        tree: Any = parse_json(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise ConfigError([f"deepspeed: cannot read {path}: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"deepspeed: {path} is not JSON: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"deepspeed: {path} must be an object of DeepSpeed's keys, got {type(tree).__name__}"])
    return _without_auto(tree)


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    out = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in out.items() if value != "auto" and not (value == {} and tree[key])}
