"""What lies in a checkpoint's folder, and whether it is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import CheckpointError
from feddra_ds.common.files import sha256

Files = dict[str, dict[str, Any]]


def folder_of(run_dir: Path, round_index: int) -> Path:
    return run_dir / "checkpoints" / f"round-{round_index:06d}"


def partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def check(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint, or None. Reads and hashes every file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        return f"manifest.json cannot be read ({error})"
    for name, about in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != about["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not the manifest's {about['bytes']}"
        if sha256(path) != about["sha256"]:
            return f"{name} does not have the manifest's sha256"
    return None


def read_coordinator(folder: Path) -> dict[str, Any]:
    """coordinator.json of a checkpoint. Raises CheckpointError."""
    try:
        return json.loads((folder / "coordinator.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: coordinator.json cannot be read ({error}); is this a checkpoint?") from error


def files_of(folder: Path) -> list[str]:
    """Files of a checkpoint by its manifest, sorted; what else lies in the folder is no part of it. Raises CheckpointError."""
    try:
        return sorted(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"])
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: manifest.json cannot be read ({error}); is this a checkpoint?") from error


def described(path: Path, root: Path) -> Files:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {str(path.relative_to(root)): {"bytes": path.stat().st_size, "sha256": sha256(path)}}


WEIGHTS = "weights"  # the models that a run gives
PREVIOUS = "previous"  # a client's own model of the last round that it trained in, where its strategy looks at it
SHARED = "global"  # owner of the shared model in checkpoints
EMA = "ema"  # owner of its moving average over the rounds (aggregate.ema)
