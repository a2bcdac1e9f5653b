"""Checkpoints: each rank writes its shard aside, the coordinator writes the manifest last and renames the folder.

    checkpoints/round-000012/            state after round 12
        weights/OWNER/shard-00000-of-00002.safetensors    fp32 fragments: flat ranges of named parameters
        weights/OWNER/buffers.safetensors
    residuals/slot-00000/shard-…      where deltas travel rounded: what rounding has kept of that slot's (compression.py)
        coordinator.json                 p, the position of each client in its data, the resolved config
        manifest.json                    bytes and sha256 of every file; without it the folder is not a checkpoint

OWNER is `global`, or a client's id where each keeps its own model. Fragments know no ranks: what was saved at one
number of ranks per client loads at any other, and at any ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .client import Client
from .engine import BUFFERS, PARTS, Engine
from .logs import logger, write_atomic
from .masters import Fragment
from .server import SHARED, ModelState, Server
from .topology import Topology

Files = dict[str, dict[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or of another model; the message names the file."""


def folder_of(run_dir: Path, round_index: int) -> Path:
    return run_dir / "checkpoints" / f"round-{round_index:06d}"


def partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def write_server(partial: Path, server: Server, clients: Iterable[Client], topology: Topology) -> Files:
    """Write this rank's part of all that the server holds; returns what the manifest will say of it."""
    written: Files = {}
    for owner in sorted({server.owner_of(client) for client in clients}):
        if owner != SHARED or topology.slot == 0:  # every slot holds the shared model
            written |= write_model(partial, owner, server.engine, server.states[owner])
    if server.residuals is not None:
        folder = partial / "residuals" / f"slot-{topology.slot:05d}"
        written |= _write_fragments(folder, partial, server.engine, server.residuals)
    return written


def write_model(partial: Path, owner: str, engine: Engine, state: ModelState) -> Files:
    """Write this rank's fragments of one model; returns what the manifest will say of them."""
    folder = partial / "weights" / owner
    written = _write_fragments(folder, partial, engine, state)
    if engine.shard == 0:
        names = engine.buffers()
        path = folder / "buffers.safetensors"
        save_file({n: v.view_as(b).contiguous() for (n, b), v in zip(names.items(), state[BUFFERS], strict=True)}, path)
        written |= _described(path, partial)
    return written


def _write_fragments(folder: Path, partial: Path, engine: Engine, state: ModelState) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    if engine.zero_stage == 0 and engine.shard != 0:
        return {}  # without partitions every rank holds the whole
    tensors, starts = {}, {}
    for part in PARTS:
        for fragment, values in engine.views_of(part, state[part]):
            tensors[fragment.name], starts[fragment.name] = values.contiguous(), fragment.start
    num_shards = engine.num_shards if engine.zero_stage > 0 else 1
    path = folder / f"shard-{engine.shard:05d}-of-{num_shards:05d}.safetensors"
    save_file(tensors, path, metadata={"starts": json.dumps(starts), "shapes": json.dumps(engine.shapes)})
    return _described(path, partial)


def commit(folder: Path, coordinator_state: dict[str, Any], files: Files, keep: int) -> None:
    """Make a partial folder a checkpoint: coordinator.json, then the manifest, then the rename; prune old ones."""
    partial = partial_of(folder)
    write_atomic(partial / "coordinator.json", json.dumps(coordinator_state, indent=1))
    files = files | _described(partial / "coordinator.json", partial)
    write_atomic(partial / "manifest.json", json.dumps({"format": 1, "files": files}, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    directory = os.open(folder.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    if keep > 0:
        for old in sorted(folder.parent.glob("round-*"))[:-keep]:
            shutil.rmtree(old)


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


def find_newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; broken ones are passed over with a warning."""
    for folder in sorted((run_dir / "checkpoints").glob("round-*"), reverse=True):
        problem = check(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, problem)
    return None


def read_coordinator(folder: Path) -> dict[str, Any]:
    """coordinator.json of a checkpoint. Raises CheckpointError."""
    try:
        return json.loads((folder / "coordinator.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: coordinator.json cannot be read ({error}); is this a checkpoint?") from error


class SavedFragments:
    """Reads flat ranges of named parameters from one folder of a checkpoint, in any partition."""

    def __init__(self, folder: Path, name: str):
        """folder: the checkpoint's; name: of the folder within it that holds the fragments."""
        self.folder = folder / name
        paths = [folder / file for file in listed(folder) if file.startswith(f"{name}/shard-")]
        if not paths:
            raise CheckpointError(f"{self.folder} holds no shard-*.safetensors")
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # name → (first, last, file)
        for file in self._files:
            metadata = file.metadata()
            self.shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
            for name, start in json.loads(metadata["starts"]).items():
                length = file.get_slice(name).get_shape()[0]
                self._pieces.setdefault(name, []).append((start, start + length, file))

    def read(self, fragment: Fragment) -> Tensor:
        """Elements of one fragment, flat fp32. Raises CheckpointError where the checkpoint lacks some of them."""
        out = torch.empty(fragment.length)
        wanted, found = (fragment.start, fragment.start + fragment.length), 0
        for first, last, file in self._pieces.get(fragment.name, []):
            low, high = max(first, wanted[0]), min(last, wanted[1])
            if low < high:
                out[low - wanted[0] : high - wanted[0]] = file.get_slice(fragment.name)[low - first : high - first]
                found += high - low
        if found != fragment.length:
            raise CheckpointError(
                f"{self.folder}: parameter {fragment.name} has {found} of the {fragment.length} elements wanted; "
                "was the checkpoint written by another model config?"
            )
        return out

    @property
    def names(self) -> Set[str]:
        """The parameters that are there."""
        return self._pieces.keys()

    def parameter(self, name: str) -> Tensor:
        """One whole parameter, fp32, in its shape."""
        shape = self.shapes[name]
        return self.read(Fragment(name, 0, int(torch.Size(shape).numel()), 0)).view(shape)

    def parameters(self) -> dict[str, Tensor]:
        """The whole model's trained parameters by name, fp32, in their shapes."""
        return {name: self.parameter(name) for name in self.names}


class SavedModel(SavedFragments):
    """Reads one owner's model from a checkpoint."""

    def __init__(self, folder: Path, owner: str):
        super().__init__(folder, f"weights/{owner}")

    def buffers(self) -> dict[str, Tensor]:
        path = self.folder / "buffers.safetensors"
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def load_into(self, engine: Engine) -> None:
        """Write this model into an engine. Collective over the slot."""
        engine.load(self.read)
        saved = self.buffers()
        with torch.no_grad():
            for name, live in engine.buffers().items():
                live.copy_(saved[name])


def read_residuals(folder: Path, server: Server, topology: Topology) -> None:
    """Give a server its slot's share of what rounding had kept when the checkpoint was written.

    Only the sum over slots matters: with other slots than then, the old ones' are added to the new ones' in turn. A
    checkpoint without any (no delta had travelled rounded) leaves the server's at 0, and says so.
    """
    if server.residuals is None:
        return
    slots = sorted({Path(file).parts[1] for file in listed(folder) if file.startswith("residuals/")})
    if not slots and topology.is_coordinator:
        logger.warning("%s holds no residuals: what rounding kept from its deltas is dropped", folder)
    for slot in slots[topology.slot :: topology.plan.num_slots]:
        saved = SavedFragments(folder, f"residuals/{slot}")
        for part, state in server.residuals.items():
            for fragment, owed in server.engine.views_of(part, state):
                owed += saved.read(fragment)


def listed(folder: Path) -> list[str]:
    """Files of a checkpoint by its manifest, sorted; what else lies in the folder is no part of it. Raises CheckpointError."""
    try:
        return sorted(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"])
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: manifest.json cannot be read ({error}); is this a checkpoint?") from error


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _described(path: Path, root: Path) -> Files:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {str(path.relative_to(root)): {"bytes": path.stat().st_size, "sha256": sha256(path)}}
