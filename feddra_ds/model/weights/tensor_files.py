"""safetensors files one tensor at a time: what transformers reads whole, or keeps mapped, costs one tensor of memory here.

The format: 8 bytes with the length of the header (little-endian), the header in JSON ({name: {dtype, shape,
data_offsets}} and optional __metadata__), then the tensors' bytes, row-major.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from feddra_ds.common.parse import check_fields, parse_json

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it


class _Entry(TypedDict):
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


_ENTRY, _HEADER = TypeAdapter(_Entry), TypeAdapter(dict[str, dict[str, Any]])


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    path: Path
    begin: int
    """Its first byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor, on the CPU. Raises ValueError where the file has become too short."""
        out = torch.empty(self.shape, dtype=self.dtype)
        if out.numel() == 0:
            return out
        view = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin)
            while len(view) > 0:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.path} is cut off: a tensor should end {len(view)} bytes behind its end")
                view = view[count:]
        return out


def stored(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises ValueError where it is none, or cut off."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = parse_json(file.read(length), _HEADER, _MAX_HEADER_BYTES)
        out, end = {}, 0
        for name, about in header.items():
            if name == "__metadata__":
                continue
            entry = check_fields(about, _ENTRY)
            begin, stop = (8 + length + offset for offset in entry["data_offsets"])
            out[name] = StoredTensor(path, begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            if stop - begin != math.prod(entry["shape"]) * out[name].dtype.itemsize:
                raise ValueError(f"{name} has {stop - begin} bytes, which are not those of its shape")
            end = max(end, stop)
    except (struct.error, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file with dtypes known here: {error}") from error
    if path.stat().st_size < end:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {end}: it is cut off")
    return out


class Shape(NamedTuple):
    """What is known of a tensor before it is there."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


def write_shards(
    shapes: Mapping[str, Shape], read: Callable[[str], Tensor], folder: Path, max_shard_size: int | str
) -> list[Path]:
    """Write tensors as a model's safetensors, cut into files as transformers cuts them, with its index where there are several.

    read(name) gives one tensor, which is dropped when it is written: memory for one at a time is needed. Returns the files.
    """
    empty = {name: torch.empty(shape.size, dtype=shape.dtype, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    files = []
    for file, names in plan.filename_to_tensors.items():
        _write({name: shapes[name] for name in names}, read, folder / file)
        files.append(folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.append(folder / INDEX)
    return files


def _write(shapes: Mapping[str, Shape], read: Callable[[str], Tensor], path: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.num_bytes
        header[name] = {"dtype": _NAMES[shape.dtype], "shape": list(shape.size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape.size), shape.dtype), name
            if tensor.numel():
                file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def all_stored(paths: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """The tensors of several files by name. Raises ValueError."""
    out: dict[str, StoredTensor] = {}
    for path in paths:
        out |= stored(path)
    return out
