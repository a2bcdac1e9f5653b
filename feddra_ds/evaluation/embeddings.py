"""Embeddings as a file, safetensors or Parquet: what `feddra-ds embed` and `evaluate --save-embeddings` write.

Legend: n rows, D embedding size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.distributed.shares import ALONE, World
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.gallery import Gallery
from feddra_ds.evaluation.opened import open_for

SUFFIXES = (".safetensors", ".parquet")


@dataclass(frozen=True)
class Embeddings:
    """names: column → n texts (client, split, key). tensors: column → (n, D) fp32, or (n,) int64."""

    names: dict[str, list[str]]
    tensors: dict[str, NDArray[np.float32] | NDArray[np.int64]]

    @classmethod
    def of(cls, galleries: Mapping[str, Gallery]) -> Embeddings:
        """The pairs of all galleries: client, split, key; image, text, text_id."""
        parts = list(galleries.values())
        names = {
            "client": [g.client for g in parts for _ in g.keys],
            "split": [g.split for g in parts for _ in g.keys],
            "key": [key for g in parts for key in g.keys],
        }
        columns = {"image": "image", "text": "text", "text_id": "text_ids"}
        return cls(names, {name: np.concatenate([getattr(g, of) for g in parts]) for name, of in columns.items()})


def embed(
    path: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "val",
    clients: Sequence[str] | None = None,
    device: str = "auto",
    max_pairs: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    ema: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Write the embeddings of a split's pictures and texts to `out`, a .safetensors or .parquet file.

    The options are those of evaluate.evaluate. Returns a dict that json.dumps takes; docs/json_output.md says what is in it.
    Raises ValueError, whose message names the option and what to do, and DataError for data that cannot be read.
    """
    where = check_path(out, "--out")
    opened = open_for(
        path,
        data=data,
        split=split,
        clients=clients,
        device=device,
        max_pairs=max_pairs,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        ema=ema,
        world=world,
    )
    galleries = opened.galleries()
    if not world.is_first:
        return {}
    return opened.about | {
        "embeddings": str(save(Embeddings.of(galleries), where, str(opened.models.source))),
        "size": next(iter(galleries.values())).image.shape[1],
        "clients": {c: {"pairs": len(g), "split": g.split, "skipped": g.skipped} for c, g in galleries.items()},
        "without_split": [client for client in opened.dataset.client_ids if client not in galleries],
        "non_finite": finite.of_evaluation(opened.models, galleries),
    }


def check_path(path: str | Path, option: str) -> Path:
    """The path. Raises ValueError, before minutes of embedding, for what cannot be written."""
    out = Path(path).expanduser()
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{option}: {out} must end with {' or '.join(SUFFIXES)}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{option}: {out.absolute().parent} is not a folder")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError(f"{option}: Parquet needs pyarrow: pip install 'feddra-ds[parquet]'") from error
    return out


def save(embeddings: Embeddings, path: Path, model: str) -> Path:
    """Write the file, whole or not at all. safetensors: the tensors, and in the header's metadata `model` and a JSON list for
    each of `names`. Parquet: a column for each, embeddings as lists, and `model` in the schema's metadata."""
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        columns = {name: pa.array(values) for name, values in embeddings.names.items()}
        for name, x in embeddings.tensors.items():
            flat = pa.array(x.reshape(-1))
            columns[name] = flat if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        parquet.write_table(pa.table(columns).replace_schema_metadata({"model": model}), partial)
    else:
        from safetensors.numpy import save_file

        about = {name: json.dumps(values) for name, values in embeddings.names.items()}
        tensors = {name: np.ascontiguousarray(x) for name, x in embeddings.tensors.items()}
        save_file(tensors, partial, {"model": model, **about})
    os.replace(partial, path)
    return path
