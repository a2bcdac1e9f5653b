"""Checkpoints: each rank writes its shard aside, the coordinator writes the manifest last and renames the folder.

    checkpoints/round-000012/            state after round 12
        weights/OWNER/shard-00000-of-00002.safetensors    fp32 fragments: flat ranges of named parameters, of those that
                                         train and of frozen ones that the server moves (model.adapter.aggregation)
        weights/OWNER/buffers.safetensors
        residuals/slot-00000/shard-…     where deltas travel rounded: what rounding has kept of that slot's (compression.py)
        kept/server/NAME/shard-…         where the strategy keeps something: NAME is its own
        kept/client/CLIENT/NAME/shard-…
        previous/CLIENT/…                where the strategy looks at it: the client's own model of its last round
        pairs/CLIENT.safetensors         where the objective keeps numbers of each training pair (federation/pairs.py)
        coordinator.json                 p, the position of each client in its data, the resolved config
        manifest.json                    bytes and sha256 of every file; without it the folder is not a checkpoint

OWNER is `global`, beside it `ema` where there is one, or a client's id where each keeps its own model. Fragments know no
ranks: what was saved at one number of ranks per client loads at any other, and at any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from feddra_ds.checkpoint.format import WEIGHTS, files_of
from feddra_ds.common.errors import CheckpointError
from feddra_ds.common.parse import parse_json
from feddra_ds.common.text import first_line
from feddra_ds.engine.engine import Engine
from feddra_ds.engine.masters import Fragment
from feddra_ds.engine.parts import BUFFERS, PARTS, ModelState, PartState

_Count = Annotated[int, Field(ge=0)]
_STARTS, _SHAPES = TypeAdapter(dict[str, _Count]), TypeAdapter(dict[str, list[_Count]])


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {first_line(error)}") from error


class SavedFragments:
    """Reads flat ranges of named parameters from one folder of a checkpoint, in any partition."""

    def __init__(self, folder: Path, name: str):
        """folder: the checkpoint's; name: of the folder within it that holds the fragments."""
        self.folder = folder / name
        paths = [folder / file for file in files_of(folder) if file.startswith(f"{name}/shard-")]
        if not paths:
            raise CheckpointError(f"{self.folder} holds no shard-*.safetensors")
        self._files = [_opened(path) for path in paths]
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # name → (first, last, file)
        for file in self._files:
            try:
                metadata = file.metadata()
                self.shapes: dict[str, list[int]] = parse_json(metadata["shapes"], _SHAPES)
                starts = parse_json(metadata["starts"], _STARTS)
                lengths = {name: file.get_slice(name).get_shape()[0] for name in starts}
            except (TypeError, KeyError, ValueError, IndexError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder}: a shard does not say what it holds: {first_line(error)}"
                ) from error
            for name, start in starts.items():
                length = lengths[name]
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

    def state(self, engine: Engine, part: str) -> PartState:
        """The fragments of a part in host tensors like the engine's slices of it; padding is 0."""
        out = [torch.zeros(live.shape) for live in engine.slices(part)]
        for fragment, values in engine.views_of(part, out):
            values.copy_(self.read(fragment))
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

    def __init__(self, folder: Path, owner: str, kind: str = WEIGHTS):
        """kind: WEIGHTS or PREVIOUS, of checkpoint/format.py."""
        super().__init__(folder, f"{kind}/{owner}")

    def buffers(self) -> dict[str, Tensor]:
        path = self.folder / "buffers.safetensors"
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def read_state(self, engine: Engine) -> ModelState:
        """This model as host states of an engine's slices; the engine itself is not touched."""
        state = {part: self.state(engine, part) for part in PARTS}
        saved = self.buffers()
        state[BUFFERS] = [saved[name].view(-1) for name in engine.buffers()]
        return state
