"""Rows of a source become a dataset of one folder of shards per client."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from feddra_ds import __version__
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.format.text import is_lfs_pointer, no_report
from feddra_ds.data.format.writer import MAX_SHARD_BYTES, DatasetWriter, image_digest, safe_name
from feddra_ds.data.loading.images import BadSample
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.sources.base import Row, Skip, Source
from feddra_ds.data.sources.dicom import Scaled
from feddra_ds.data.sources.encode import Encoded, encode_image
from feddra_ds.data.sources.journal import Journal
from feddra_ds.data.sources.reports import choose_sections
from feddra_ds.data.sources.split import choose_validation, components
from feddra_ds.data.sources.spool import Spool
from feddra_ds.data.threads import in_threads

_SHOWN = 20
_REHEARSED = 200
_NO_REPORT = ("no report", "git lfs pointer")
_HARMLESS = ("overwrite", "max_no_report", "dry_run", "restart")  # options that no shard depends on
SKIPPED_NAME = "skipped.csv"


@dataclass(frozen=True)
class IngestOptions:
    """val_fraction, test_fraction: shares of each client's pairs for val and test. image_size: pixels that larger images
    are shrunk to on their shorter side; None keeps them. repeated_texts: a text that several groups share may be on both
    sides of the split. seed: of the split and of the order in the shards. sections: the parts of a report that are taken; ()
    takes the whole text, None what the source takes. max_no_report: the share of rows whose text may be no report, such as
    `nan`, before all is refused. dry_run: write nothing, and look at some of the pictures only. frame: which to take of
    a DICOM file with several. restart: begin anew where a conversion into the same folder was cut off."""

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
    restart: bool = False


@dataclass(frozen=True)
class Ingested:
    """counts: {client's folder: {split: pairs}}. skipped: the rows that were left out, in the source's order. own_split:
    whether rows came with a split of their own. scaled: how grey pictures of more than 8 bits came to 8, with their names.
    num_kept: shards that an earlier conversion, which was cut off, had finished."""

    counts: dict[str, Counter[str]]
    skipped: list[Skip]
    own_split: bool = False
    scaled: tuple[tuple[Scaled, str], ...] = ()
    num_kept: int = 0


class _Gathered(NamedTuple):
    """folders: each client's. files: the number of each of the source's files. digest: of the rows."""

    folders: dict[str, str]
    files: dict[str, int]
    digest: str


def ingest(source: Source, out: Path, options: IngestOptions, track: Track = untracked) -> Ingested:
    """Write the source's rows as a dataset at `out`; rows that were left out are listed there in skipped.csv.

    Where a conversion into `out` was cut off, it goes on behind the shards that are finished, and gives the same bytes.
    Raises DataError for a source or a folder that cannot be used, and where the source or an option is another than when it
    was cut off; a first conversion then writes nothing.
    """
    skipped: list[Skip] = []
    place = next(folder for folder in (out.parent, *out.absolute().parents) if folder.is_dir())
    with Spool(place) as rows:
        names = _gather(source, rows, options, skipped, track)
        writer = DatasetWriter(out, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite)
        if options.dry_run:
            return _rehearse(source, rows, names.folders, options, skipped, track)
        journal = Journal(writer.aside, _facts(source, options, names.digest), options.restart)
        writer.log = journal
        scaled: list[tuple[Scaled, str]] = []
        with journal, writer:
            order, own_split = _deal_out(journal, source, rows, options, skipped, track)
            counts = _write(writer, journal, source, rows, order, names, options, skipped, scaled, track)
            if not counts:
                raise _nothing_usable(source, skipped)
            skipped.sort(key=lambda skip: (skip.file, skip.line))
            writer.info |= {
                "source": source.path.name,
                "client_names": {folder: name for name, folder in names.folders.items()},
                "label_columns": list(source.columns.labels),
                "image_size": options.image_size,
                "skipped_rows": dict(sorted(Counter(skip.reason for skip in skipped).items())),
            }
            _list_skipped(writer.aside / SKIPPED_NAME, skipped)
    return Ingested(counts, skipped, own_split, tuple(scaled), len(journal.shards))


def _facts(source: Source, options: IngestOptions, digest: str) -> dict[str, Any]:
    """All that the bytes of the shards depend on, by the option that says it."""
    option = lambda name: f"--{name.replace('_', '-')}"
    own = {option(name): value for name, value in asdict(options).items() if name not in _HARMLESS}
    columns = {option(f"{name}_columns" if name == "labels" else f"{name}_column"): value
               for name, value in asdict(source.columns).items()}  # fmt: skip
    asked = {f"--source-option {key}": value for key, value in source.options.model_dump(mode="json").items()}
    path = source.path.absolute() if source.path.exists() else source.path  # an id is no path
    kind = f"{type(source).__module__}:{type(source).__qualname__}"
    facts = {"--from": kind, source.option: str(path), **columns, **asked, **own}
    return facts | {"feddra-ds": __version__, "Pillow": PIL.__version__, f"rows of {path}": digest}


def _nothing_usable(source: Source, skipped: list[Skip]) -> DataError:
    return DataError([f"{source.option}: no row of {source.path} is usable", *skipped_lines(skipped, source.unit)])


def _gather(source: Source, rows: Spool, options: IngestOptions, skipped: list[Skip], track: Track) -> _Gathered:
    """Keep the source's usable rows. Raises DataError where too many texts are no reports, and two clients share a folder."""
    sections = source.sections if options.sections is None else options.sections
    clients: set[str] = set()
    files: dict[str, int] = {}
    digest = hashlib.blake2b(digest_size=16)
    empty: list[Skip] = []
    for item in track(source.rows(), None, "reading rows"):
        if isinstance(item, Row):
            kept = _with_text(item, sections)
            if isinstance(kept, Row):
                digest.update(rows.append(kept))
                digest.update(kept.picture or b"")
                clients.add(kept.client)
                files.setdefault(kept.file, len(files))
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
    return _Gathered(_client_folders(clients), files, digest.hexdigest())


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
    for number, image in track(in_threads(lambda n: _encode(source, rows[n], options), some), len(some), "looking"):
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
    journal: Journal, source: Source, rows: Spool, options: IngestOptions, skipped: list[Skip], track: Track
) -> tuple[list[tuple[int, str]], bool]:
    """(row, split) of the rows whose image can be read, in a seeded order, so that a shard is a fair sample; and whether
    any came with a split."""

    def digest(number: int) -> tuple[Row, str | Skip]:
        row = rows[number]
        found = journal.pictures.get(number)
        if found is None:
            try:
                found = image_digest(_image_of(source, row))
            except (OSError, ValueError) as error:
                found = _unreadable(row, error)
        row.picture = None
        return row, found

    numbers: list[int] = []
    clients: list[str] = []
    given: list[str] = []
    links: list[list[object]] = []
    for number, (row, found) in track(in_threads(digest, range(len(rows))), len(rows), "reading images"):
        journal.found(number, found)
        if isinstance(found, Skip):
            skipped.append(found)
            continue
        numbers.append(number)
        clients.append(row.client)
        given.append(row.split)
        links.append([("picture", found), *_ties(row, options)])
    splits = _splits(clients, given, components(links), options)
    order = [(numbers[i], splits[i]) for i in permutation(len(numbers), "shards", options.seed)]
    return order, any(given)


def _image_of(source: Source, row: Row) -> bytes:
    """The row's encoded image. Raises OSError and ValueError."""
    data = source.read_image(row) if row.picture is None else row.picture
    if is_lfs_pointer(data):
        raise ValueError("a Git-LFS pointer, not the picture; git lfs pull fetches it")
    return data


def _unreadable(row: Row, error: Exception) -> Skip:
    detail = getattr(error, "strerror", None) or error
    return Skip(row.line, "image file cannot be read", f"{row.image}: {detail}", row.file)


def _encode(source: Source, row: Row, options: IngestOptions, before: str | None = None) -> Encoded | Skip:
    """The row's image as a shard holds it. before: its digest when the conversion was cut off, where it was.

    Raises DataError where the image is another one now.
    """
    try:
        data = _image_of(source, row)
    except (OSError, ValueError) as error:
        if before is None:
            return _unreadable(row, error)
        data = b""
    if before is not None and image_digest(data) != before:
        raise DataError(f"{source.option}: the picture {row.image} has changed or is gone since the conversion was cut off; "
                        "bring it back, or begin anew with --restart")  # fmt: skip
    try:
        return encode_image(data, options.image_size, options.frame)
    except BadSample as error:
        return Skip(row.line, error.reason.replace("_", " "), row.image, row.file)
    except (OSError, ValueError) as error:
        return _unreadable(row, error)


def _write(
    writer: DatasetWriter,
    journal: Journal,
    source: Source,
    rows: Spool,
    order: list[tuple[int, str]],
    names: _Gathered,
    options: IngestOptions,
    skipped: list[Skip],
    scaled: list[tuple[Scaled, str]],
    track: Track,
) -> dict[str, Counter[str]]:
    """Write what finished shards do not have yet; {client: {split: pairs}} of all."""
    counts: dict[str, Counter[str]] = {}
    for shard in journal.shards:
        counts.setdefault(shard.client, Counter())[shard.split] += shard.items - len(shard.skipped)
        skipped += shard.skipped
        scaled += shard.scaled
    left = journal.left(order, lambda number: names.folders[rows[number].client])

    def work(item: tuple[int, str]) -> tuple[Row, Encoded | Skip]:
        row = rows[item[0]]
        before = journal.pictures.get(item[0])
        image = _encode(source, row, options, before if isinstance(before, str) else None)
        row.picture = None
        return row, image

    for (_, split), (row, image) in track(in_threads(work, left), len(left), "writing shards"):
        client = names.folders[row.client]
        if isinstance(image, Skip):
            skipped.append(image)
            journal.take(client, split, skip=image)
            continue
        how = None if image.scaled is None else (image.scaled, row.image)
        scaled += [] if how is None else [how]
        writer.add(client, split, _key(row, names.files), **_members(row, image))
        journal.take(client, split, scaled=how)
        counts.setdefault(client, Counter())[split] += 1
    return counts


def _key(row: Row, files: dict[str, int]) -> str:
    """The pair's key: the image's name and the row's line, with its file's number, as lines of two files may be equal."""
    file = files[row.file]
    return f"{safe_name(Path(row.image).stem)[:48]}-{f'{file}_' if file else ''}{row.line}"


def _members(row: Row, image: Encoded) -> dict[str, Any]:
    """What DatasetWriter.add takes of a pair."""
    info = {
        "labels": row.labels,
        "site": row.site,
        "patient": row.group or None,
        "client": row.client,
        "line": row.line,
    }
    return {"image": image.data, "suffix": image.suffix, "text": row.text, "info": info}


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
