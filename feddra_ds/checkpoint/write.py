"""Writing a checkpoint: each rank its fragments, aside; the coordinator commits by one rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from feddra_ds.checkpoint.format import WEIGHTS, Files, described, partial_of
from feddra_ds.common.files import write_atomic
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.parts import BUFFERS, PARTS, ModelState


def write_model(partial: Path, owner: str, engine: Engine, state: ModelState, *, kind: str = WEIGHTS) -> Files:
    """Write this rank's fragments of one model; returns what the manifest will say of them. kind: see SavedModel."""
    folder = partial / kind / owner
    written = write_fragments(folder, partial, engine, state)
    if engine.slot_rank == 0:
        names = engine.buffers()
        path = folder / "buffers.safetensors"
        save_file({n: v.view_as(b).contiguous() for (n, b), v in zip(names.items(), state[BUFFERS], strict=True)}, path)
        written |= described(path, partial)
    return written


def write_fragments(folder: Path, partial: Path, engine: Engine, state: ModelState) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    if engine.zero_stage == 0 and engine.slot_rank != 0:
        return {}  # without partitions every rank holds the whole
    tensors, starts = {}, {}
    for part in (name for name in PARTS if name in state):
        for fragment, values in engine.views_of(part, state[part]):
            tensors[fragment.name], starts[fragment.name] = values.contiguous(), fragment.start
    num_shards = engine.ranks_per_slot if engine.zero_stage > 0 else 1
    path = folder / f"shard-{engine.slot_rank:05d}-of-{num_shards:05d}.safetensors"
    save_file(tensors, path, metadata={"starts": json.dumps(starts), "shapes": json.dumps(engine.shapes)})
    return described(path, partial)


def commit(folder: Path, coordinator_state: dict[str, Any], files: Files, keep: int) -> None:
    """Make a partial folder a checkpoint: coordinator.json, then the manifest, then the rename; prune old ones."""
    partial = partial_of(folder)
    write_atomic(partial / "coordinator.json", json.dumps(coordinator_state, indent=1))
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
