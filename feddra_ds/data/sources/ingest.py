"""Rows of a source become a dataset of one folder of shards per client."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.format.writer import MAX_SHARD_BYTES, DatasetWriter, image_digest, safe_name
from feddra_ds.data.loading.images import MAX_PIXELS, BadSample, to_rgb
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.sources.base import Row, Skip, Source
from feddra_ds.data.sources.split import choose_validation, components

_READABLE = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_EXIF_ORIENTATION = 0x0112
_SHOWN = 20
SKIPPED_NAME = "skipped.csv"
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class IngestOptions:
    """val_fraction, test_fraction: shares of each client's pairs for val and test. image_size: pixels that larger images
    are shrunk to on their shorter side; None keeps them. repeated_texts: a text that several groups share may be on both
    sides of the split. seed: of the split and of the order in the shards."""

    val_fraction: float = 0.1
    test_fraction: float = 0.0
    image_size: int | None = None
    repeated_texts: bool = False
    seed: int = 0
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False


@dataclass(frozen=True)
class Ingested:
    """counts: {client's folder: {split: pairs}}. skipped: the rows that were left out, in the source's order."""

    counts: dict[str, Counter[str]]
    skipped: list[Skip]


def ingest(source: Source, out: Path, options: IngestOptions, track: Track = untracked) -> Ingested:
    """Write the source's rows as a dataset at `out`; rows that were left out are listed there in skipped.csv.

    Raises DataError for a source or a folder that cannot be used; then nothing is written.
    """
    rows: list[Row] = []
    skipped: list[Skip] = []
    for item in source.rows():
        if isinstance(item, Row):
            rows.append(item)
        else:
            skipped.append(item)
    folders = _client_folders(rows)
    with DatasetWriter(out, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite) as writer:
        rows, links = _find_images(source, rows, options, skipped, track)
        groups = components(links)
        splits = _splits([row.client for row in rows], groups, options)
        counts = _write(writer, source, rows, splits, folders, options, skipped, track)
        if not counts:
            raise DataError([f"{source.option}: no row of {source.path} is usable", *skipped_lines(skipped)])
        skipped.sort(key=lambda skip: skip.line)
        writer.info |= {
            "source": source.path.name,
            "client_names": {folder: name for name, folder in folders.items()},
            "label_columns": list(source.columns.labels),
            "image_size": options.image_size,
            "skipped_rows": dict(sorted(Counter(skip.reason for skip in skipped).items())),
        }
        _list_skipped(writer.aside / SKIPPED_NAME, skipped)
    return Ingested(counts, skipped)


def _splits(clients: list[str], groups: list[list[int]], options: IngestOptions) -> list[str]:
    """The split of each row; no group is on two. test is chosen out of what val leaves, which it does not change."""
    out = ["train"] * len(clients)
    for row in np.flatnonzero(choose_validation(clients, groups, options.val_fraction, options.seed)):
        out[row] = "val"
    if options.test_fraction > 0:
        left = [i for i, split in enumerate(out) if split == "train"]
        place = {row: i for i, row in enumerate(left)}
        inside = [[place[row] for row in group] for group in groups if group[0] in place]
        share = options.test_fraction / (1 - options.val_fraction)
        for i in np.flatnonzero(choose_validation([clients[row] for row in left], inside, share, options.seed)):
            out[left[i]] = "test"
    return out


def _client_folders(rows: Iterable[Row]) -> dict[str, str]:
    """Each client's folder name. Raises DataError where two clients would share one."""
    folders = {name: safe_name(name) for name in sorted({row.client for row in rows})}
    problems = []
    for folder, times in Counter(folder.lower() for folder in folders.values()).items():
        if times > 1:
            names = [repr(name) for name, own in folders.items() if own.lower() == folder]
            problems.append(f"--client-column: {' and '.join(names)} would share the folder {folder}; rename one")
    if problems:
        raise DataError(problems)
    return folders


def _find_images(
    source: Source, rows: list[Row], options: IngestOptions, skipped: list[Skip], track: Track
) -> tuple[list[Row], list[list[object]]]:
    """The rows whose image can be read, and what ties each to others: group, report, picture."""

    def digest(row: Row) -> str | Skip:
        try:
            return image_digest(source.read_image(row))
        except (OSError, ValueError) as error:
            return _unreadable(row, error)

    kept: list[Row] = []
    links: list[list[object]] = []
    for row, found in track(_in_threads(digest, rows), len(rows), "reading images"):
        if isinstance(found, Skip):
            skipped.append(found)
            continue
        kept.append(row)
        ties: list[object] = [("picture", found)]
        if row.group:
            ties.append(("group", row.group))
        if not options.repeated_texts:
            ties.append(("text", text_id(row.text)))
        links.append(ties)
    return kept, links


def _unreadable(row: Row, error: Exception) -> Skip:
    return Skip(row.line, "image file cannot be read", f"{row.image}: {getattr(error, 'strerror', error)}")


def _write(
    writer: DatasetWriter,
    source: Source,
    rows: list[Row],
    splits: list[str],
    folders: dict[str, str],
    options: IngestOptions,
    skipped: list[Skip],
    track: Track,
) -> dict[str, Counter[str]]:
    """Write the pairs in a seeded order, so that a shard is a fair sample; {client: {split: pairs}}."""
    order = [(rows[i], splits[i]) for i in permutation(len(rows), "shards", options.seed)]

    def encode(item: tuple[Row, str]) -> tuple[bytes, str] | Skip:
        row = item[0]
        try:
            return encode_image(source.read_image(row), options.image_size)
        except BadSample as error:
            return Skip(row.line, error.reason.replace("_", " "), row.image)
        except (OSError, ValueError) as error:
            return _unreadable(row, error)

    counts: dict[str, Counter[str]] = {}
    for (row, split), image in track(_in_threads(encode, order), len(order), "writing shards"):
        if isinstance(image, Skip):
            skipped.append(image)
            continue
        client = folders[row.client]
        info = {
            "labels": row.labels,
            "site": row.site,
            "patient": row.group or None,
            "client": row.client,
            "line": row.line,
        }
        key = f"{safe_name(Path(row.image).stem)[:48]}-{row.line}"
        writer.add(client, split, key, image=image[0], suffix=image[1], text=row.text, info=info)
        counts.setdefault(client, Counter())[split] += 1
    return counts


def encode_image(data: bytes, shorter_side: int | None) -> tuple[bytes, str]:
    """(bytes, suffix) of a checked image: the JPEG or PNG itself where nothing has to change, else encoded anew.

    Larger images are shrunk to `shorter_side`, photographs turned upright, other formats become PNG. Raises BadSample.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=_READABLE)
        if opened.width * opened.height > MAX_PIXELS:
            raise BadSample("oversized_image")
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(opened.format or "", "")
        upright = opened.getexif().get(_EXIF_ORIENTATION, 1) in (0, 1)
        shrink = shorter_side is not None and min(opened.size) > shorter_side
        opened.load()
        if suffix and upright and not shrink:
            return data, suffix
        image: Image.Image = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError as error:
        raise BadSample("oversized_image") from error
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many types for broken files
        raise BadSample("corrupt_image") from error
    if image.mode not in ("L", "RGB"):
        image = image.convert("L") if image.mode == "1" else to_rgb(image)
    if shrink and shorter_side is not None:
        scale = shorter_side / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if suffix == "jpg":
        image.save(out, "JPEG", quality=92)
        return out.getvalue(), "jpg"
    image.save(out, "PNG")
    return out.getvalue(), "png"


def _in_threads(work: Callable[[_In], _Out], items: list[_In]) -> Iterator[tuple[_In, _Out]]:
    """(item, work(item)) in order, a bounded number under way; Pillow and file reading release the interpreter lock."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[_In, Future[_Out]]] = deque()
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) >= 64:
                item, future = ahead.popleft()
                yield item, future.result()
        while ahead:
            item, future = ahead.popleft()
            yield item, future.result()


def _list_skipped(path: Path, skipped: list[Skip]) -> None:
    if skipped:
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["line", "reason", "detail"])
            table.writerows((skip.line, skip.reason, skip.detail) for skip in skipped)


def skipped_lines(skipped: list[Skip]) -> list[str]:
    """A line for each of the first rows that were left out, and how many more there are."""
    lines = [f"line {s.line}: {s.reason}" + (f" ({s.detail})" if s.detail else "") for s in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f"… and {len(skipped) - _SHOWN} more")
    return lines
