"""Rows of a source become a dataset of one folder of shards per client."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.format.text import is_lfs_pointer, no_report
from feddra_ds.data.format.writer import MAX_SHARD_BYTES, DatasetWriter, image_digest, safe_name
from feddra_ds.data.loading.images import MAX_PIXELS, WIDE_MODES, BadSample, orientation, stretch, to_rgb
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.sources.base import Row, Skip, Source
from feddra_ds.data.sources.dicom import DicomError, Scaled, is_dicom, read_dicom
from feddra_ds.data.sources.reports import choose_sections
from feddra_ds.data.sources.split import choose_validation, components
from feddra_ds.data.sources.spool import Spool

_READABLE = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_SHOWN = 20
_REHEARSED = 200
_NO_REPORT = ("no report", "git lfs pointer")
SKIPPED_NAME = "skipped.csv"
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class IngestOptions:
    """val_fraction, test_fraction: shares of each client's pairs for val and test. image_size: pixels that larger images
    are shrunk to on their shorter side; None keeps them. repeated_texts: a text that several groups share may be on both
    sides of the split. seed: of the split and of the order in the shards. sections: the parts of a report that are taken; ()
    takes the whole text, None what the source takes. max_no_report: the share of rows whose text may be no report, such as
    `nan`, before all is refused. dry_run: write nothing, and look at some of the pictures only. frame: which to take of
    a DICOM file with several."""

    val_fraction: float = 0.1
    test_fraction: float = 0.0
    image_size: int | None = None
    repeated_texts: bool = False
    seed: int = 0
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False
    sections: tuple[str, ...] | None = None
    max_no_report: float = 0.1
    dry_run: bool = False
    frame: int | None = None


@dataclass(frozen=True)
class Ingested:
    """counts: {client's folder: {split: pairs}}. skipped: the rows that were left out, in the source's order. own_split:
    whether rows came with a split of their own. scaled: how grey pictures of more than 8 bits came to 8, with their names."""

    counts: dict[str, Counter[str]]
    skipped: list[Skip]
    own_split: bool = False
    scaled: tuple[tuple[Scaled, str], ...] = ()


def ingest(source: Source, out: Path, options: IngestOptions, track: Track = untracked) -> Ingested:
    """Write the source's rows as a dataset at `out`; rows that were left out are listed there in skipped.csv.

    Raises DataError for a source or a folder that cannot be used; then nothing is written.
    """
    skipped: list[Skip] = []
    place = next(folder for folder in (out.parent, *out.absolute().parents) if folder.is_dir())
    with Spool(place) as rows:
        clients = _gather(source, rows, options, skipped, track)
        folders = _client_folders(clients)
        writer = DatasetWriter(out, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite)
        if options.dry_run:
            return _rehearse(source, rows, folders, options, skipped, track)
        scaled: list[tuple[Scaled, str]] = []
        with writer:
            numbers, splits, own_split = _deal_out(source, rows, options, skipped, track)
            counts = _write(writer, source, rows, numbers, splits, folders, options, skipped, scaled, track)
            if not counts:
                raise _nothing_usable(source, skipped)
            skipped.sort(key=lambda skip: (skip.file, skip.line))
            writer.info |= {
                "source": source.path.name,
                "client_names": {folder: name for name, folder in folders.items()},
                "label_columns": list(source.columns.labels),
                "image_size": options.image_size,
                "skipped_rows": dict(sorted(Counter(skip.reason for skip in skipped).items())),
            }
            _list_skipped(writer.aside / SKIPPED_NAME, skipped)
    return Ingested(counts, skipped, own_split, tuple(scaled))


def _nothing_usable(source: Source, skipped: list[Skip]) -> DataError:
    return DataError([f"{source.option}: no row of {source.path} is usable", *skipped_lines(skipped, source.unit)])


def _gather(source: Source, rows: Spool, options: IngestOptions, skipped: list[Skip], track: Track) -> set[str]:
    """Keep the source's usable rows; returns their clients. Raises DataError where too many texts are no reports."""
    sections = source.sections if options.sections is None else options.sections
    clients: set[str] = set()
    empty: list[Skip] = []
    for item in track(source.rows(), None, "reading rows"):
        if isinstance(item, Row):
            kept = _with_text(item, sections)
            if isinstance(kept, Row):
                rows.append(kept)
                clients.add(kept.client)
                continue
            empty += [kept] if kept.reason in _NO_REPORT else []
            item = kept
        skipped.append(item)
    rows.flush()
    total = len(rows) + len(empty)
    if empty and len(empty) > options.max_no_report * total:
        raise DataError(
            f"{source.option}: {len(empty)} of {total} texts in {source.path} are no reports, more than "
            f"{options.max_no_report:.0%}; e.g. {skipped_lines(empty[:1], source.unit)[0]}; "
            "name another text column, or raise --max-no-report"
        )
    return clients


def _with_text(row: Row, sections: Sequence[str]) -> Row | Skip:
    """The row with the wanted sections of its text; a Skip where that is no report."""
    reason = no_report(row.text)
    if reason is not None:
        return Skip(row.line, reason.replace("_", " "), row.text.strip()[:60], row.file)
    if sections:
        row.text = choose_sections(row.text, sections)
        if not row.text:
            return Skip(row.line, f"no section {' or '.join(sections)}", row.image, row.file)
        return _with_text(row, ())
    return row


def _rehearse(
    source: Source, rows: Spool, folders: dict[str, str], options: IngestOptions, skipped: list[Skip], track: Track
) -> Ingested:
    """What would be written: all rows, of which `_REHEARSED` evenly spaced pictures are looked at."""
    some = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _REHEARSED)).astype(int)).tolist()
    bad = set()
    for number, image in track(_in_threads(lambda n: _encode(source, rows[n], options), some), len(some), "looking"):
        if isinstance(image, Skip):
            skipped.append(image)
            bad.add(number)
    numbers = [number for number in range(len(rows)) if number not in bad]
    if not numbers:
        raise _nothing_usable(source, skipped)
    links: list[list[object]] = []
    clients, given = [], []
    for row in (rows[number] for number in numbers):
        links.append(_ties(row, options))
        clients.append(row.client)
        given.append(row.split)
    counts: dict[str, Counter[str]] = {}
    for client, split in zip(clients, _splits(clients, given, components(links), options), strict=True):
        counts.setdefault(folders[client], Counter())[split] += 1
    return Ingested(counts, sorted(skipped, key=lambda skip: (skip.file, skip.line)), any(given))


def _splits(clients: list[str], given: list[str], groups: list[list[int]], options: IngestOptions) -> list[str]:
    """The split of each row; no group is on two, but for rows that come with a split (`given`, "" for none).

    Rows that are tied to such a row go where it is. test is chosen out of what val leaves, which it does not change.
    """
    out = list(given)
    for group in groups:
        own = next((given[row] for row in group if given[row]), "")
        for row in group:
            out[row] = out[row] or own
    for split, share in (("val", options.val_fraction), ("test", options.test_fraction / (1 - options.val_fraction))):
        free = [row for row, name in enumerate(out) if not name]
        place = {row: number for number, row in enumerate(free)}
        inside = [[place[row] for row in group] for group in groups if group[0] in place]
        for number in np.flatnonzero(choose_validation([clients[row] for row in free], inside, share, options.seed)):
            out[free[number]] = split
    return [name or "train" for name in out]


def _client_folders(clients: Iterable[str]) -> dict[str, str]:
    """Each client's folder name. Raises DataError where two clients would share one."""
    folders = {name: safe_name(name) for name in sorted(clients)}
    problems = []
    for folder, times in Counter(folder.lower() for folder in folders.values()).items():
        if times > 1:
            names = [repr(name) for name, own in folders.items() if own.lower() == folder]
            problems.append(f"--client-column: {' and '.join(names)} would share the folder {folder}; rename one")
    if problems:
        raise DataError(problems)
    return folders


def _ties(row: Row, options: IngestOptions) -> list[object]:
    """What ties a row to others, but for its picture: group and report."""
    ties: list[object] = [("group", row.group)] if row.group else []
    return ties if options.repeated_texts else [*ties, ("text", text_id(row.text))]


def _deal_out(
    source: Source, rows: Spool, options: IngestOptions, skipped: list[Skip], track: Track
) -> tuple[list[int], list[str], bool]:
    """The rows whose image can be read, the split of each, and whether any came with one."""

    def digest(number: int) -> tuple[Row, str] | Skip:
        row = rows[number]
        try:
            found = image_digest(_image_of(source, row))
        except (OSError, ValueError) as error:
            return _unreadable(row, error)
        row.picture = None
        return row, found

    numbers: list[int] = []
    clients: list[str] = []
    given: list[str] = []
    links: list[list[object]] = []
    for number, found in track(_in_threads(digest, range(len(rows))), len(rows), "reading images"):
        if isinstance(found, Skip):
            skipped.append(found)
            continue
        row, picture = found
        numbers.append(number)
        clients.append(row.client)
        given.append(row.split)
        links.append([("picture", picture), *_ties(row, options)])
    return numbers, _splits(clients, given, components(links), options), any(given)


def _image_of(source: Source, row: Row) -> bytes:
    """The row's encoded image. Raises OSError and ValueError."""
    data = source.read_image(row) if row.picture is None else row.picture
    if is_lfs_pointer(data):
        raise ValueError("a Git-LFS pointer, not the picture; git lfs pull fetches it")
    return data


def _unreadable(row: Row, error: Exception) -> Skip:
    detail = getattr(error, "strerror", None) or error
    return Skip(row.line, "image file cannot be read", f"{row.image}: {detail}", row.file)


def _encode(source: Source, row: Row, options: IngestOptions) -> Encoded | Skip:
    try:
        return encode_image(_image_of(source, row), options.image_size, options.frame)
    except BadSample as error:
        return Skip(row.line, error.reason.replace("_", " "), row.image, row.file)
    except (OSError, ValueError) as error:
        return _unreadable(row, error)


def _write(
    writer: DatasetWriter,
    source: Source,
    rows: Spool,
    numbers: list[int],
    splits: list[str],
    folders: dict[str, str],
    options: IngestOptions,
    skipped: list[Skip],
    scaled: list[tuple[Scaled, str]],
    track: Track,
) -> dict[str, Counter[str]]:
    """Write the pairs in a seeded order, so that a shard is a fair sample; {client: {split: pairs}}."""
    order = [(numbers[i], splits[i]) for i in permutation(len(numbers), "shards", options.seed)]

    def work(item: tuple[int, str]) -> tuple[Row, Encoded | Skip]:
        row = rows[item[0]]
        image = _encode(source, row, options)
        row.picture = None
        return row, image

    counts: dict[str, Counter[str]] = {}
    files: dict[str, int] = {}
    for (_, split), (row, image) in track(_in_threads(work, order), len(order), "writing shards"):
        if isinstance(image, Skip):
            skipped.append(image)
            continue
        if image.scaled is not None:
            scaled.append((image.scaled, row.image))
        client = folders[row.client]
        info = {
            "labels": row.labels,
            "site": row.site,
            "patient": row.group or None,
            "client": row.client,
            "line": row.line,
        }
        file = files.setdefault(row.file, len(files))  # lines of two files may be equal
        key = f"{safe_name(Path(row.image).stem)[:48]}-{f'{file}_' if file else ''}{row.line}"
        writer.add(client, split, key, image=image.data, suffix=image.suffix, text=row.text, info=info)
        counts.setdefault(client, Counter())[split] += 1
    return counts


class Encoded(NamedTuple):
    """An image for a shard: its bytes, their suffix, and how grey of more than 8 bits came to 8, where it did."""

    data: bytes
    suffix: str
    scaled: Scaled | None = None


def encode_image(data: bytes, shorter_side: int | None, frame: int | None = None) -> Encoded:
    """A checked image: the JPEG or PNG itself where nothing has to change, else encoded anew, without any metadata.

    Larger images are shrunk to `shorter_side`, photographs turned upright, other formats become PNG, DICOM among them, of
    which `frame` chooses one of several. Raises BadSample, and DicomError, a ValueError.
    """
    scaled: Scaled | None = None
    try:
        if is_dicom(data):
            picture, scaled = read_dicom(data, frame)
            plain = io.BytesIO()
            picture.save(plain, "PNG", compress_level=1)
            data = plain.getvalue()
        opened = Image.open(io.BytesIO(data), formats=_READABLE)
        if opened.width * opened.height > MAX_PIXELS:
            raise BadSample("oversized_image")
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(opened.format or "", "")
        upright = orientation(opened) == 1
        shrink = shorter_side is not None and min(opened.size) > shorter_side
        opened.load()
        if suffix and upright and not shrink:
            return Encoded(data, suffix, scaled)
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode in WIDE_MODES:
            grey, clipped = stretch(np.asarray(image))
            image, scaled = Image.fromarray(grey), Scaled("percentiles", clipped)
    except Image.DecompressionBombError as error:
        raise BadSample("oversized_image") from error
    except (BadSample, DicomError, DataError):
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
        image.info.clear()
        image.save(out, "JPEG", quality=92)
        return Encoded(out.getvalue(), "jpg", scaled)
    image.info.clear()  # Pillow would write comments and EXIF again
    image.save(out, "PNG")
    return Encoded(out.getvalue(), "png", scaled)


def _in_threads(work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[tuple[_In, _Out]]:
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
            table.writerow(["file", "line", "reason", "detail"])
            table.writerows((skip.file, skip.line, skip.reason, skip.detail) for skip in skipped)


def skipped_lines(skipped: list[Skip], unit: str = "line") -> list[str]:
    """A line for each of the first rows that were left out, and how many more there are; only the number of those that
    were not wanted. unit: what a place in a file is called."""
    bad = [skip for skip in skipped if not skip.is_choice]
    lines = []
    for skip in bad[:_SHOWN]:
        place = f"{skip.file} {unit} {skip.line}".strip()
        lines.append(f"{place}: {skip.reason}" + (f" ({skip.detail})" if skip.detail else ""))
    if len(bad) > _SHOWN:
        lines.append(f"… and {len(bad) - _SHOWN} more")
    choices = Counter(skip.reason for skip in skipped if skip.is_choice)
    return lines + [f"{count} as asked: {reason}" for reason, count in sorted(choices.items())]
