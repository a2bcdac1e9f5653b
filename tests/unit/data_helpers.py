"""Small datasets for the tests of feddra_ds.data, with samples that are broken on purpose."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import DataConfig, StreamingConfig
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.preflight import preflight
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.tokens import load_tokenizer

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def encoded(number: int, size: tuple[int, int] = (40, 32), form: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image of smooth colours that differ with `number`."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phase = number * 0.37
    planes = [np.sin(3 * x + phase), np.cos(4 * y - phase), np.sin(5 * x * y + 2 * phase)]
    array = ((np.stack(planes, axis=-1) + 1) * 127).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, form)
    return out.getvalue()


def huge_png(side: int = 20_000) -> bytes:
    """A PNG of side × side pixels in a few kilobytes: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(side // 8 + 1)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BROKEN: dict[str, dict[str, Any]] = {
    "missing_image": {"image": None},
    "corrupt_image": {"image": b"not an image"},
    "missing_text": {"text": None},
    "empty_text": {"text": " \n "},
}


def make_dataset(
    root: Path,
    clients: dict[str, dict[str, int]],
    broken: dict[tuple[str, str, int], dict[str, Any]] | None = None,
    max_shard_bytes: int = 1 << 20,
) -> Dataset:
    """Clients with {split: pairs}. broken: (client, split, number) → members to replace. Texts name their sample."""
    with DatasetWriter(root, max_shard_bytes=max_shard_bytes) as writer:
        for client, splits in clients.items():
            for split, count in splits.items():
                for number in range(count):
                    sample: dict[str, Any] = {"image": encoded(number), "text": f"report {number} of {client}"}
                    sample |= (broken or {}).get((client, split, number), {})
                    info = {"labels": {"odd": number % 2}, "site": client, "patient": f"p{number // 2}"}
                    writer.add(client, split, f"{split}{number:04d}", info=info, **sample)
    return Dataset(root)


def preflight_lines(
    root: str | Path, ids: list[str] | None, *, options: StreamingConfig | None = None, **check: Any
) -> list[str]:
    """What a run would be told of the dataset under `root` before it starts."""
    try:
        return preflight(open_dataset(root, options=options), ids, **check)
    except DataError as error:
        return error.problems


def client_data(
    dataset: Dataset,
    clients: list[str],
    split: str = "train",
    *,
    pool: DecodePool,
    slot_rank: int = 0,
    ranks_per_slot: int = 1,
    seed: int = 7,
    kind: type[ClientData] = ClientData,
    **config: Any,
) -> ClientData:
    """A ClientData with small pictures."""
    settings = {"batch_size": 4, "image_size": 16, "text_length": 12, **config}
    return kind(
        dataset,
        clients,
        split,
        config=DataConfig(**settings),
        seed=seed,
        tokenizer=load_tokenizer(None),
        image_mean=MEAN,
        image_std=STD,
        slot_rank=slot_rank,
        ranks_per_slot=ranks_per_slot,
        pool=pool,
    )
