"""Writing a checkpoint: each rank copies what it holds, then writes it aside; the coordinator commits by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from feddra_ds.checkpoint.format import WEIGHTS, Files, described, partial_of
from feddra_ds.common.files import write_atomic
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, FROZEN, PARTS, ModelState


@dataclass(frozen=True)
class Piece:
    """A safetensors file of a checkpoint that is still to be written. path: in its folder; tensors: on the host, its own."""

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None


def copy_model(owner: str, engine: Engine, state: ModelState, *, kind: str = WEIGHTS) -> list[Piece]:
    """Copies of this rank's fragments of one model. kind: see SavedModel."""
    folder = f"{kind}/{owner}"
    pieces = copy_fragments(folder, engine, state)
    if engine.slot_rank == 0:
        buffers = zip(engine.buffers().items(), state[BUFFERS], strict=True)
        pieces.append(Piece(f"{folder}/buffers.safetensors", {name: _copy(v.view_as(b)) for (name, b), v in buffers}))
    return pieces


def copy_fragments(folder: str, engine: Engine, state: ModelState) -> list[Piece]:
    """Copies of this rank's fragments of what lies in one folder of the checkpoint."""
    if engine.zero_stage == 0 and engine.slot_rank != 0:
        return []  # without partitions every rank holds the whole
    tensors, starts = {}, {}
    for part in (name for name in (*PARTS, FROZEN) if name in state):
        for fragment, values in engine.views_of(part, state[part]):
            tensors[fragment.name], starts[fragment.name] = _copy(values), fragment.start
    num_shards = engine.ranks_per_slot if engine.zero_stage > 0 else 1
    path = f"{folder}/shard-{engine.slot_rank:05d}-of-{num_shards:05d}.safetensors"
    return [Piece(path, tensors, {"starts": json.dumps(starts), "shapes": json.dumps(engine.shapes)})]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write(partial: Path, pieces: list[Piece], before_each: Callable[[], None] = lambda: None) -> Files:
    """Write pieces, each of which leaves the list, and the host, as it is written; what the manifest will say of them."""
    written: Files = {}
    while pieces:
        before_each()
        piece = pieces.pop(0)
        path = partial / piece.path
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(piece.tensors, path, metadata=piece.metadata)
        written |= described(path, partial)
    return written


def commit(folder: Path, coordinator_state: str, files: Files, keep: int) -> None:
    """Make a partial folder a checkpoint: coordinator.json, then the manifest, then the rename; prune old ones."""
    partial = partial_of(folder)
    write_atomic(partial / "coordinator.json", coordinator_state)
    files = files | described(partial / "coordinator.json", partial)
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
