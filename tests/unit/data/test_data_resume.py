"""A conversion that was cut off goes on: the same bytes as in one go, and nothing finished is done again."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import encoded
from PIL import Image

from feddra_ds.cli import main
from feddra_ds.common.errors import DataError
from feddra_ds.data.format import writer
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.sources import ingest as ingest_module
from feddra_ds.data.sources.base import Columns
from feddra_ds.data.sources.ingest import Ingested, IngestOptions, ingest
from feddra_ds.data.sources.journal import Journal
from feddra_ds.data.sources.table import Table

PAIRS = 48
OPTIONS = IngestOptions(val_fraction=0.25, image_size=24, max_shard_bytes=12_000)


@pytest.fixture
def source(tmp_path: Path) -> Table:
    """Two tables of 24 pairs each, of three clients; one picture is none, one is broken, some have 16 bits."""
    place = tmp_path / "source"
    place.mkdir()
    for part in range(2):
        with (place / f"{part}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "text", "hospital"])
            table.writerows([f"{n}.png", f"report {n}", f"H{n % 3}"] for n in range(24 * part, 24 * part + 24))
    for n in range(PAIRS):
        (place / f"{n}.png").write_bytes(encoded(n, form="PNG"))
    for n in (4, 31):
        deep = np.random.default_rng(n).integers(0, 60_000, (32, 40)).astype(np.uint16)
        Image.fromarray(deep).save(place / f"{n}.png")
    (place / "9.png").unlink()
    (place / "14.png").write_bytes(encoded(14, form="PNG")[:200])
    return Table(place, Columns("image", "text", "hospital"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(source: Table, out: Path, at: int | None) -> None:
    """Convert in a process that is killed before its `at`-th step, or, with None, while it makes the index."""
    steps = iter(range(10_000))

    def track(items: Any, total: int | None, what: str) -> Iterator[Any]:
        for item in items:
            if next(steps) == at:
                kill()
            yield item

    def work() -> None:
        if at is None:
            writer.index_folder = kill  # type: ignore[assignment]
        ingest(source, out, OPTIONS, track)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


# Steps: 48 rows are read, then 48 pictures, then 47 are written.
@pytest.mark.parametrize(("at", "finished"), [((80,), False), ((120,), True), ((110, 115, 118), True), ((None,), True)])
def test_a_conversion_goes_on_where_it_was_killed(
    source: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[int | None, ...], finished: bool
) -> None:
    whole = ingest(source, tmp_path / "whole", OPTIONS)
    assert len(whole.skipped) == 2
    assert len(whole.scaled) == 2
    out = tmp_path / "out"
    for step in at:
        killed(source, out, step)
    assert not out.exists()
    aside = tmp_path / ".out.partial"
    before = {path: path.stat().st_mtime_ns for path in aside.rglob("*.tar")}
    encodings: list[int] = []
    encode = ingest_module.encode_image
    monkeypatch.setattr(ingest_module, "encode_image", lambda *args: encodings.append(1) or encode(*args))
    done = ingest(source, out, OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")
    assert (done.counts, done.skipped) == (whole.counts, whole.skipped)
    assert sorted(name for _, name in done.scaled) == sorted(name for _, name in whole.scaled)
    assert bool(done.num_kept) == finished
    kept = [out / path.relative_to(aside) for path, at in before.items()
            if (out / path.relative_to(aside)).stat().st_mtime_ns == at]  # fmt: skip
    assert len(kept) == done.num_kept, "finished shards were not written again, others were"
    if at == (None,):
        assert not encodings, "all was written, the index was to be made"
    elif finished:
        assert 0 < len(encodings) < 47, "only what no finished shard has"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing stays beside it"


def cut_off(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C at the `at`-th pair that is written."""

    def track(items: Any, total: int | None, what: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if what == "writing shards" and number == at:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("feddra_ds.commands.data_convert.track", track)


def words(source: Table, out: Path, **changes: object) -> list[str]:
    given = {"from": "csv", "path": source.path, "image-column": "image", "text-column": "text", "out": out,
             "client-column": "hospital", "max-shard-bytes": 65_536, **changes}  # fmt: skip
    return ["data", "convert", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]


def test_another_option_or_source_is_refused_by_name(
    source: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(PAIRS):
        (source.path / f"{n}.png").write_bytes(encoded(n, size=(128, 128), form="PNG"))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_off(patch, 40)
        assert main(words(source, out)) == 130
    assert "cut off; the same command goes on behind the shards that are finished" in capsys.readouterr().err
    place, since = tmp_path / ".out.partial", "since the conversion into"
    assert main(words(source, out, **{"image-size": 32, "seed": 1})) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"feddra-ds: --image-size: was not given and is 32 {since} {place} was cut off; --restart begins anew",
        f"feddra-ds: --seed: was 0 and is 1 {since} {place} was cut off; --restart begins anew",
    ]
    table = source.path / "1.csv"
    text = table.read_text()
    table.write_text(text.replace("report 30", "report thirty"))
    assert main(words(source, out)) == 2
    assert capsys.readouterr().err == (
        f"feddra-ds: rows of {source.path}: have changed {since} {place} was cut off; --restart begins anew\n"
    )
    table.write_text(text)
    assert main(words(source, out)) == 0
    printed = capsys.readouterr().out
    assert f"shards were finished when a conversion into {out} was cut off, and were kept" in printed
    assert sum(open_dataset(out).num_samples(c, s) for c in ("H0", "H1", "H2") for s in ("train", "val")) == PAIRS


def test_a_picture_or_a_shard_that_changed_is_refused_and_a_restart_begins_anew(source: Table, tmp_path: Path) -> None:
    killed(source, tmp_path / "out", 125)
    pictures = {n: (source.path / f"{n}.png").read_bytes() for n in range(PAIRS) if n != 9}
    for n in pictures:
        (source.path / f"{n}.png").write_bytes(encoded(n + 100, form="PNG"))
    with pytest.raises(
        DataError, match=r"--path: the picture \d+.png has changed or is gone since the conversion was cut"
    ):
        ingest(source, tmp_path / "out", OPTIONS)
    for n, data in pictures.items():
        (source.path / f"{n}.png").write_bytes(data)
    shard = sorted((tmp_path / ".out.partial").rglob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(
        DataError, match=r"000000.tar is not the shard that was finished before .*; --restart begins anew"
    ):
        ingest(source, tmp_path / "out", OPTIONS)
    whole = ingest(source, tmp_path / "whole", OPTIONS)
    done: Ingested = ingest(source, tmp_path / "out", IngestOptions(**{**OPTIONS.__dict__, "restart": True}))
    assert (done.num_kept, done.counts) == (0, whole.counts)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_conversions_into_one_folder_are_refused(source: Table, tmp_path: Path) -> None:
    with (
        Journal(tmp_path / ".out.partial", {}),
        pytest.raises(
            DataError, match=r"--out: another conversion is at work in .*out.partial; wait until it has ended"
        ),
    ):
        ingest(source, tmp_path / "out", OPTIONS)


def noted(folder: Path, *pictures: tuple[int, str]) -> dict[int, Any]:
    """The pictures that a journal knows of; these are added, then it is cut off."""
    journal = Journal(folder, {"--seed": 0}).__enter__()
    folder.mkdir(exist_ok=True)
    for row, digest in pictures:
        journal.found(row, digest)
    journal.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    return journal.pictures


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / ".out.partial"
    noted(folder, (0, "a1"), (1, "b2"))
    with (tmp_path / ".out.partial.jsonl").open("ab") as file:
        file.write(b'[2, "c')
    assert noted(folder, (2, "c3")) == {0: "a1", 1: "b2"}
    assert noted(folder) == {0: "a1", 1: "b2", 2: "c3"}
