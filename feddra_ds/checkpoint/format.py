"""What lies in a checkpoint's folder, and whether it is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from feddra_ds.common.errors import CheckpointError
from feddra_ds.common.files import sha256
from feddra_ds.common.parse import parse_json
from feddra_ds.common.text import shown

Files = dict[str, dict[str, Any]]


class _File(TypedDict):
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class _Manifest(TypedDict):
    files: dict[str, _File]


class _Coordinator(TypedDict, total=False):
    """What is read of coordinator.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    round: Required[Annotated[int, Field(ge=0)]]
    config: Required[dict[str, Any]]
    metrics: dict[str, Any]
    next_client_weights: list[float]
    positions: dict[str, dict[str, Any]]


_MANIFEST, _COORDINATOR = TypeAdapter(_Manifest), TypeAdapter(_Coordinator)


def folder_of(run_dir: Path, round_index: int) -> Path:
    return run_dir / "checkpoints" / f"round-{round_index:06d}"


def partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def check(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint, or None. Reads and hashes every file."""
    try:
        files = _manifest(folder)
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    if "coordinator.json" not in files:
        return "manifest.json does not name coordinator.json"
    for name, about in files.items():
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
        kind: TypeAdapter[Any] = _COORDINATOR
        return parse_json((folder / "coordinator.json").read_bytes(), kind)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: coordinator.json cannot be read ({error}); is this a checkpoint?") from error


def files_of(folder: Path) -> list[str]:
    """Files of a checkpoint by its manifest, sorted; what else lies in the folder is no part of it. Raises CheckpointError."""
    try:
        return sorted(_manifest(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: manifest.json cannot be read ({error}); is this a checkpoint?") from error


def _manifest(folder: Path) -> dict[str, _File]:
    """Files of a checkpoint by name. Raises OSError, and ValueError where the manifest is none."""
    files = parse_json((folder / "manifest.json").read_bytes(), _MANIFEST)["files"]
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"it names {shown(name)}, which is not in its folder")
    return files


def described(path: Path, root: Path) -> Files:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {str(path.relative_to(root)): {"bytes": path.stat().st_size, "sha256": sha256(path)}}


WEIGHTS = "weights"  # the models that a run gives
PREVIOUS = "previous"  # a client's own model of the last round that it trained in, where its strategy looks at it
SHARED = "global"  # owner of the shared model in checkpoints
EMA = "ema"  # owner of its moving average over the rounds (aggregate.ema)
