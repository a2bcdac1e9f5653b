"""`feddra-ds data convert`: a CSV with a folder of images becomes a dataset of one folder of shards per client."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from feddra_ds.common.console import guarded, next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.format.writer import MAX_SHARD_BYTES, DatasetWriter, image_digest, safe_name
from feddra_ds.data.loading.images import MAX_PIXELS, BadSample, to_rgb
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.sources.split import choose_validation, components
from feddra_ds.data.sources.table import Columns, Row, Skip, read_rows

_READABLE = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_EXIF_ORIENTATION = 0x0112
_SHOWN = 20
SKIPPED_NAME = "skipped.csv"
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data convert`."""
    add = parser.add_argument
    add(
        "--csv",
        required=True,
        type=Path,
        metavar="FILE",
        help="table with a header line, UTF-8; comma, ; or tab separated",
    )
    add("--image-column", required=True, metavar="C", help="column of image paths, relative to the CSV's folder")
    add("--text-column", required=True, metavar="C", help="column of reports or captions")
    add("--client-column", metavar="C", help="column that says whose pair it is (default: all in one client, `all`)")
    add("--group-column", metavar="C", help="column, such as the patient, whose rows stay on one side of train and val")
    add("--site-column", metavar="C", help="column kept as the pair's site (default: the client column)")
    add("--label-columns", metavar="C,C", default="", help="columns kept as labels, separated by commas")
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of each client's pairs for val (default %(default)s)",
    )
    add(
        "--image-size", type=int, metavar="N", help="shrink images to N pixels on the shorter side (default: keep them)"
    )
    add(
        "--repeated-texts",
        action="store_true",
        help="let a text that several groups share be on both sides; by default they stay together, so that "
        "val holds no report seen in training",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the split and of the order in the shards (default %(default)s)",
    )
    add("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, metavar="N", help="bytes per shard (default 256 MiB)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")


@guarded
def run(args: argparse.Namespace) -> int:
    """Convert; prints a table of clients and the rows left out. Returns 0, or 2 with the problems on stderr."""
    _check_numbers(args)
    labels = tuple(name.strip() for name in args.label_columns.split(",") if name.strip())
    columns = Columns(
        args.image_column, args.text_column, args.client_column, args.group_column, args.site_column, labels
    )
    rows, skipped = read_rows(args.csv, columns)
    folders = _client_folders(rows)
    with DatasetWriter(args.out, max_shard_bytes=args.max_shard_bytes, overwrite=args.overwrite) as writer:
        rows, links = _find_images(rows, args, skipped)
        validation = choose_validation([row.client for row in rows], components(links), args.val_fraction, args.seed)
        counts = _write(writer, rows, validation, folders, args, skipped)
        if not counts:
            raise DataError([f"--csv: no row of {args.csv} is usable", *_skipped_lines(skipped)])
        skipped.sort(key=lambda skip: skip.line)
        reasons = dict(sorted(Counter(skip.reason for skip in skipped).items()))
        writer.info |= {
            "source": args.csv.name,
            "client_names": {folder: name for name, folder in folders.items()},
            "label_columns": list(labels),
            "image_size": args.image_size,
            "skipped_rows": reasons,
        }
        _write_skipped(writer.aside / SKIPPED_NAME, skipped)
    _report(args, counts, skipped)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    problems = []
    if not 0 <= args.val_fraction < 1:
        problems.append(f"--val-fraction: must be at least 0 and below 1, got {args.val_fraction}")
    if args.image_size is not None and args.image_size < 8:
        problems.append(f"--image-size: must be at least 8, got {args.image_size}")
    if args.max_shard_bytes < 1 << 16:
        problems.append(f"--max-shard-bytes: must be at least 65536, got {args.max_shard_bytes}")
    if problems:
        raise DataError(problems)


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
    rows: list[Row], args: argparse.Namespace, skipped: list[Skip]
) -> tuple[list[Row], list[list[object]]]:
    """The rows whose image file is there, and what ties each to others: patient, report, picture."""
    folder = args.csv.parent

    def digest(row: Row) -> str | Skip:
        try:
            return image_digest((folder / row.image).read_bytes())
        except (OSError, ValueError) as error:
            return Skip(row.line, "image file cannot be read", f"{row.image}: {getattr(error, 'strerror', error)}")

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
        if not args.repeated_texts:
            ties.append(("text", text_id(row.text)))
        links.append(ties)
    return kept, links


def _write(
    writer: DatasetWriter,
    rows: list[Row],
    validation: np.ndarray,
    folders: dict[str, str],
    args: argparse.Namespace,
    skipped: list[Skip],
) -> dict[str, Counter[str]]:
    """Write the pairs in a seeded order, so that a shard is a fair sample; {client: {split: pairs}}."""
    order = [(rows[i], bool(validation[i])) for i in permutation(len(rows), "shards", args.seed)]

    def encode(item: tuple[Row, bool]) -> tuple[bytes, str] | Skip:
        row = item[0]
        try:
            return encode_image((args.csv.parent / row.image).read_bytes(), args.image_size)
        except BadSample as error:
            return Skip(row.line, error.reason.replace("_", " "), row.image)
        except OSError as error:
            return Skip(row.line, "image file cannot be read", f"{row.image}: {error.strerror}")

    counts: dict[str, Counter[str]] = {}
    for (row, is_val), image in track(_in_threads(encode, order), len(order), "writing shards"):
        if isinstance(image, Skip):
            skipped.append(image)
            continue
        client, split = folders[row.client], "val" if is_val else "train"
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


def _write_skipped(path: Path, skipped: list[Skip]) -> None:
    if skipped:
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["line", "reason", "detail"])
            table.writerows((skip.line, skip.reason, skip.detail) for skip in skipped)


def _skipped_lines(skipped: list[Skip]) -> list[str]:
    lines = [f"line {s.line}: {s.reason}" + (f" ({s.detail})" if s.detail else "") for s in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f"… and {len(skipped) - _SHOWN} more")
    return lines


def _report(args: argparse.Namespace, counts: dict[str, Counter[str]], skipped: list[Skip]) -> None:
    rows: list[tuple[object, ...]] = []
    for client, count in sorted(counts.items()):
        rows.append((client, count["train"], count["val"], count["val"] / count.total()))
    total = sum(counts.values(), Counter())
    rows.append(("all", total["train"], total["val"], total["val"] / total.total()))
    print_table(f"{args.out}", ["client", "train pairs", "val pairs", "val fraction"], rows, total=True)
    if skipped:
        print(f"{len(skipped)} rows were left out ({args.out / SKIPPED_NAME} lists them all):")
        print("\n".join(f"  {line}" for line in _skipped_lines(skipped)))
    uneven = []
    for client, count in sorted(counts.items()):
        wanted = args.val_fraction * count.total()
        if abs(count["val"] - wanted) > max(1.0, 0.05 * count.total()):
            uneven.append(f"{client} ({count['val']} of {count.total()} pairs are val, {wanted:.0f} were wanted)")
    if uneven:
        loosen = "" if args.repeated_texts else "; --repeated-texts loosens it"
        print(f"patients, texts and pictures that must stay together allow no nearer split of {listed(uneven)}{loosen}")
    next_step(
        f"feddra-ds data inspect {args.out}",
        f"feddra-ds train --config cxr_regions --data.root {args.out} --run.output_dir runs/{Path(args.out).name}",
    )
