"""data.clients, client_field, text_field, val_fraction: shards that others made, read where they lie, in exact order."""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from data_helpers import client_data, encoded

from feddra_ds.cli import main
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.indexing import split_of
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.streaming import StreamingData


def write_tar(path: Path, numbers: range, form: str = "JPEG", name: str = "{:05d}", **info: Any) -> None:
    """Pairs as img2dataset leaves them: NAME.jpg, NAME.txt, NAME.json with a caption and `info`, whose lists are by pair."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for n in numbers:
            told = {key: value[n % len(value)] if isinstance(value, list) else value for key, value in info.items()}
            members = {
                {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]: encoded(n, form=form),
                "txt": f"report {n}".encode(),
                "json": json.dumps({"caption": f"report {n}", **told}).encode(),
            }
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{name.format(n)}.{suffix}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Any]:
    return {"streaming": {"cache_dir": str(tmp_path / "cache")}}


def opened(**data: Any) -> Dataset:
    config = DataConfig(**data)
    return open_dataset(config.root, data=config)


@pytest.mark.parametrize(
    ("name", "split"),
    [("00000.tar", "train"), ("a/val/00000.tar", "val"), ("s3://b/cc3m-validation-0001.tar", "val"), ("x/test_3.tar", "test"),
     ("valves/train-1.tar", "train"), ("val/train-1.tar", "train"), ("retrained.tar", "train")],
)  # fmt: skip
def test_splits_by_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_clients_as_folder_braces_and_list_have_webdataset_s_samples(tmp_path: Path, cache: dict[str, Any]) -> None:
    for client in ("north", "south", "east"):
        for shard in range(3):
            write_tar(tmp_path / client / f"{shard:05d}.tar", range(8 * shard, 8 * shard + 8), name=client + "{}")
    write_tar(tmp_path / "east" / "val" / "00000.tar", range(100, 104))
    dataset = opened(
        clients={
            "north": str(tmp_path / "north"),
            "south": str(tmp_path / "south" / "{00000..00001}.tar"),
            "east": [str(tmp_path / "east" / "{00000..00002}.tar"), str(tmp_path / "east" / "val" / "00000.tar")],
        },
        **cache,
    )
    assert dataset.client_ids == ["north", "south", "east"], "in the config's order"
    assert {c: (dataset.num_samples(c, "train"), dataset.num_samples(c, "val")) for c in dataset.client_ids} == {
        "north": (24, 0), "south": (16, 0), "east": (24, 4)}  # fmt: skip
    part = dataset.samples("south", "train")
    theirs = webdataset.WebDataset(str(tmp_path / "south" / "{00000..00001}.tar"), shardshuffle=False)
    assert [(k, part.read_image(i), part.read_text(i)) for i, k in enumerate(part.keys)] == [
        (one["__key__"], one["jpg"], one["txt"]) for one in theirs
    ]
    assert not list(tmp_path.rglob("index.json")), "nothing is written beside the shards"


def test_the_index_is_made_once_and_anew_when_a_shard_changes(
    tmp_path: Path, cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from feddra_ds.data.format.indexing import Indexer

    read: list[str] = []
    add = Indexer.add
    monkeypatch.setattr(
        Indexer, "add", lambda self, name, *rest, **more: (read.append(name), add(self, name, *rest, **more))
    )
    shard = tmp_path / "north" / "00000.tar"
    write_tar(shard, range(4))
    for _ in range(2):
        assert opened(clients={"north": str(tmp_path / "north")}, **cache).num_samples("north", "train") == 4
    assert len(read) == 1
    assert opened(clients={"north": str(shard)}, text_field="caption", **cache).samples("north", "train").keys
    assert len(read) == 2, "another field is another index"
    write_tar(shard, range(6))
    os.utime(shard, (1, 1))
    assert opened(clients={"north": str(tmp_path / "north")}, **cache).num_samples("north", "train") == 6


def test_one_set_split_by_a_field(tmp_path: Path, cache: dict[str, Any]) -> None:
    for shard in range(2):
        write_tar(tmp_path / "set" / f"{shard:05d}.tar", range(9 * shard, 9 * shard + 9), hospital=["a", "b", "St. C"])
    for root in (tmp_path / "set", tmp_path / "set" / "{00000..00001}.tar"):
        dataset = opened(root=str(root), client_field="hospital", **cache)
        assert dataset.client_ids == ["St_C", "a", "b"]
        keys = {c: dataset.samples(c, "train").keys for c in dataset.client_ids}
        assert keys["b"] == [f"{n:05d}" for n in range(18) if n % 3 == 1]
        assert dataset.samples("b", "train").read_text(1) == b"report 4"
    with pytest.raises(DataError, match=r"data.client_field: none of the 18 pairs has ward in its json"):
        opened(root=str(tmp_path / "set"), client_field="ward", **cache)


def test_folders_of_bare_tars_under_a_root(tmp_path: Path, cache: dict[str, Any]) -> None:
    write_tar(tmp_path / "data" / "north" / "00000.tar", range(5))
    write_tar(tmp_path / "data" / "south" / "00000.tar", range(7))
    dataset = opened(root=str(tmp_path / "data"), **cache)
    assert {c: dataset.num_samples(c, "train") for c in dataset.client_ids} == {"north": 5, "south": 7}


def test_one_of_several_captions_is_drawn_in_each_epoch(tmp_path: Path, cache: dict[str, Any]) -> None:
    captions = [[f"word{n} first", f"word{n} second", f"word{n} third"] for n in range(12)]
    write_tar(tmp_path / "n" / "0.tar", range(12), captions=captions)
    dataset = opened(clients={"n": str(tmp_path / "n")}, text_field="captions", **cache)
    assert dataset.samples("n", "train").read_text(3) == b"word3 first"
    drawn: dict[str, set[int]] = {}
    with DecodePool() as pool:
        data = client_data(dataset, ["n"], pool=pool)
        epochs = [list(data.batches(data.advance(Position(), 3 * epoch), 3)) for epoch in range(20)]
        again = list(client_data(dataset, ["n"], pool=pool).batches(data.advance(Position(), 3), 3))
        (evaluated,) = data.evaluation_batches(None, 12)
    assert [b.text_ids.tolist() for b in again] == [b.text_ids.tolist() for b in epochs[1]], "seeded"
    for batches in epochs:
        for batch in batches:
            for key, text in zip(batch.keys, batch.text_ids.tolist(), strict=True):
                drawn.setdefault(key, set()).add(text)
    assert all(len(texts) > 1 for texts in drawn.values())
    assert len(set().union(*drawn.values())) == 36, "each caption of each pair comes"
    order = [evaluated.keys.index(key) for key in dataset.samples("n", "train").keys]
    assert evaluated.text_ids[order].tolist() == dataset.samples("n", "train").text_ids.tolist(), (
        "the first in evaluation"
    )


def test_val_fraction_keeps_patients_together_and_stays(tmp_path: Path, cache: dict[str, Any]) -> None:
    patients = [f"p{n // 3}" for n in range(300)]
    write_tar(tmp_path / "n" / "0.tar", range(300), patient=patients)

    def sides(fraction: float, **clients: str) -> dict[str, set[str]]:
        dataset = opened(clients=clients, val_fraction=fraction, **cache)
        return {split: set(dataset.samples("n", split).keys) for split in dataset.splits("n")}

    found = sides(0.2, n=str(tmp_path / "n"))
    assert found["train"] | found["val"] == {f"{n:05d}" for n in range(300)}
    assert not found["train"] & found["val"]
    of = lambda keys: {patients[int(key)] for key in keys}
    assert not of(found["train"]) & of(found["val"])
    assert 35 <= len(found["val"]) <= 90
    write_tar(tmp_path / "n" / "-1.tar", range(300, 330), patient=[f"q{n}" for n in range(330)])
    more = sides(0.2, n=str(tmp_path / "n"))
    assert found["val"] <= more["val"], "other shards change nothing"
    assert found["train"] <= more["train"]
    assert found["val"] <= sides(0.4, n=str(tmp_path / "n"))["val"], "a larger part keeps what was val"
    assert sorted(found["val"])[:4] == ["00009", "00010", "00011", "00036"], "as in every release"


def test_val_fraction_of_data_converted_here_reads_their_patients(tmp_path: Path) -> None:
    from data_helpers import make_dataset

    make_dataset(tmp_path / "d", {"a": {"train": 200}, "b": {"train": 40, "val": 10}})
    dataset = open_dataset(tmp_path / "d", data=DataConfig(val_fraction=0.25))
    part = dataset.samples("a", "val")
    count = Counter(part.read_info(i)["patient"] for i in range(len(part)))
    assert set(count.values()) == {2}, "patients have two pairs each"
    assert 25 <= len(part) <= 80
    assert (dataset.num_samples("b", "train"), dataset.num_samples("b", "val")) == (40, 10), "b has a val split"


@pytest.mark.parametrize(
    ("at", "line"),
    [
        ("nowhere", "data.clients.n: nowhere is neither a folder nor a shard"),
        ("{tmp}/packed", "data.clients.n: {tmp}/packed has no .tar shards; 0.tar.gz is compressed: unpack it"),
        ("{tmp}/packed/0.tar.gz", "data.clients.n: {tmp}/packed/0.tar.gz is compressed, so that no sample"),
        ("{tmp}/n/{{0..3}}.tar", "data.clients.n: {tmp}/n/1.tar is not there (3 of 4 shards are missing)"),
        ("pipe:cat {tmp}/n/0.tar", "data.clients.n: pipe: runs a program here; it is refused unless"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, at: str, line: str) -> None:
    write_tar(tmp_path / "n" / "0.tar", range(2))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(DataError) as error:
        opened(clients={"n": at.format(tmp=tmp_path)})
    (problem,) = error.value.problems
    assert problem.startswith(line.format(tmp=tmp_path))


def test_contradictions() -> None:
    with pytest.raises(ConfigError) as error:
        from_dict({"data": {"root": "x", "clients": {"a/b": "y"}, "client_field": "h"}})
    said = "\n".join(error.value.problems)
    assert "data.root: contradicts data.clients" in said
    assert "data.client_field: contradicts data.clients" in said
    assert "data.clients: 'a/b' cannot be a client's name" in said


def test_a_pipe_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(2):
        write_tar(tmp_path / "n" / f"{shard}.tar", range(shard * 4, shard * 4 + 4))
    clients = json.dumps({"n": f"pipe:cat {tmp_path}/n/{{0..1}}.tar"})
    words = ["data", "index", "--data.clients", clients, "--data.streaming.cache_dir", str(tmp_path / "cache")]
    assert main(words) == 2
    assert main([*words, "--data.streaming.allow_pipe", "true"]) == 0
    assert "n: 8 train pairs in 2 shards" in capsys.readouterr().out


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """`ulimit -n 1024`, which is what many machines give; how many are open before the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("kind", "most"), [(ClientData, 128), pytest.param(StreamingData, 16, marks=pytest.mark.slow)])
def test_16_clients_of_64_shards_take_turns_with_1024_descriptors(
    tmp_path: Path, cache: dict[str, Any], few_descriptors: int, kind: type[ClientData], most: int
) -> None:
    write_tar(tmp_path / "one.tar", range(1))
    shard = (tmp_path / "one.tar").read_bytes()
    clients = {f"c{client}": str(tmp_path / f"c{client}") for client in range(16)}
    for place in clients.values():
        Path(place).mkdir()
        for number in range(64):
            (Path(place) / f"{number:05d}.tar").write_bytes(shard)
    dataset = opened(clients=clients, order="streaming" if kind is StreamingData else "exact", **cache)
    dataset.options.shuffle_buffer = 10
    num = 8 if kind is ClientData else 2  # all shards of a client, or a quarter of them
    with DecodePool() as pool:
        every = [client_data(dataset, [client], pool=pool, kind=kind, batch_size=8) for client in clients]
        for batches in zip(*(data.batches(Position(), num) for data in every), strict=True):
            assert {len(batch.keys) for batch in batches} == {8}
            now = len(os.listdir("/proc/self/fd")) - few_descriptors
            assert now <= most + 4, "and the directory itself, and the like"
    del every, dataset, batches
    gc.collect()
    end = time.monotonic() + 20  # threads that read ahead end soon
    while (left := len(os.listdir("/proc/self/fd"))) > few_descriptors + 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert left <= few_descriptors + 1, "none stays open"
