"""Shards as other tools leave them: each layout has webdataset's own number of samples and trains, or is refused in a line."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers import metrics_of, on_ranks, run_all, tree
from PIL import Image

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.loading.stream import Stream
from feddra_ds.data.loading.streaming import build_data
from feddra_ds.data.loading.tokens import load_tokenizer

PAIRS, SHARDS = 36, 3  # of each client, over all its shards
NUMBERS = np.arange(PAIRS).reshape(SHARDS, -1).tolist()  # of the pairs of each shard
TOKENIZER = functools.cache(lambda: load_tokenizer(None))
Members = Callable[[int], dict[str, bytes]]


def picture(number: int, form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 40)).save(out, form)
    return out.getvalue()


def told(**info: Any) -> bytes:
    return json.dumps(info).encode()


def text(number: int) -> bytes:
    return f"finding {number} at the left base".encode()


def img2dataset(n: int) -> dict[str, bytes]:
    return {f"{n:09d}.jpg": picture(n), f"{n:09d}.txt": text(n), f"{n:09d}.json": told(key=n, status="success")}


# What the tars of a layout hold, pair by pair.
MEMBERS: dict[str, Members] = {
    "flat_img2dataset": img2dataset,
    "img2dataset_per_client": img2dataset,
    "json_captions": lambda n: {f"{n}.jpg": picture(n), f"{n}.json": told(report=text(n).decode())},
    "several_captions": lambda n: {f"{n}.png": picture(n, "PNG"), f"{n}.json": told(report=[f"first {n}", f"second {n}"])},
    "webp": lambda n: {f"{n}.webp": picture(n, "WEBP"), f"{n}.txt": text(n)},
    "dot_members": lambda n: {f"./{n}.JPG": picture(n), f"./{n}.txt": text(n)},
    "dotted_folders": lambda n: {f"batch.v1/{n % 2}/{n}.jpeg": picture(n), f"batch.v1/{n % 2}/{n}.txt": text(n)},
    "braces_over_http": img2dataset,
    "pipe_cat": img2dataset,
}  # fmt: skip


def write(folder: Path, members: Members) -> Path:
    """Three shards of 12 pairs each, by `tar`."""
    folder.mkdir(parents=True)
    for shard, numbers in enumerate(NUMBERS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as out:
            for name, data in (pair for n in numbers for pair in members(n).items()):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return folder


def write_with_shard_writer(folder: Path) -> Path:
    """The same, by webdataset itself, whose encoder writes the text and the json."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=PAIRS // SHARDS, verbose=0) as out:
        for n in range(PAIRS):
            out.write({"__key__": f"{n:06d}", "jpg": picture(n), "txt": text(n).decode(), "json": {"patient": f"p{n}"}})
    return folder


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """data.clients of all layouts that have a client in each place."""
    root = tmp_path_factory.mktemp("layouts")
    out: dict[str, Any] = {name: str(write(root / name, members)) for name, members in MEMBERS.items()}
    out["shard_writer"] = str(write_with_shard_writer(root / "shard_writer"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out["flat_img2dataset"] = f"{root}/flat_img2dataset/{{00000..00002}}.tar"
    out["braces_over_http"] = f"http://127.0.0.1:{server.server_address[1]}/braces_over_http/{{00000..00002}}.tar"
    out["pipe_cat"] = [f"pipe:cat {root}/pipe_cat/{shard:05d}.tar" for shard in range(SHARDS)]
    yield out
    server.shutdown()
    server.server_close()


def streaming(cache: Path) -> dict[str, Any]:
    return {"cache_dir": str(cache), "allow_pipe": True, "timeout_s": 30.0, "shuffle_buffer": 10}


def of_webdataset(place: str | list[str]) -> list[dict[str, Any]]:
    """The samples that webdataset reads of a folder's tars, of braces, or of a list."""
    folder = Path(place) if isinstance(place, str) else None
    urls = sorted(map(str, folder.glob("*.tar"))) if folder is not None and folder.is_dir() else place
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def image_of(sample: dict[str, Any]) -> bytes:
    return next(sample[end] for end in ("jpg", "jpeg", "png", "webp") if end in sample)


def assert_the_same(data: dict[str, Any], client: str, theirs: list[dict[str, Any]], cache: Path) -> None:
    """The client has these samples: by offset, in a pass of streaming, and decoded, on one rank and on two."""
    samples = open_dataset(data.get("root"), data=DataConfig(**data)).samples(client, "train")
    keys = [one["__key__"] for one in theirs]
    assert samples.keys == keys
    assert [samples.read_image(i) for i in range(len(samples))] == [image_of(one) for one in theirs]
    for order in ("exact", "streaming"):
        config = DataConfig(order=order, batch_size=6, image_size=8, text_length=8, **data)
        config.streaming.cache_dir = str(cache / order)  # so that streaming finds no index
        dataset = open_dataset(config.root, data=config)
        for num_ranks in (1, 2):
            own = [
                build_data(
                    dataset, [client], "train", config=config, seed=0, tokenizer=TOKENIZER(), slot_rank=rank,
                    image_mean=(0.5,) * 3, image_std=(0.5,) * 3, ranks_per_slot=num_ranks,
                )
                for rank in range(num_ranks)
            ]  # fmt: skip
            decoded = [key for part in own for batch in part.evaluation_batches(None, 6) for key in batch.keys]
            assert sorted(decoded) == sorted(keys), (order, num_ranks)
            assert not any(part.take_skipped() for part in own), "each sample can be decoded"
            if order == "streaming":
                parts = [dataset.stream(client, "train")]
                ranks = [
                    Stream(parts, 0, client, buffer=10, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
                ]
                read = [item.raw.key for rank in ranks for item in rank.sample(None)]
                assert sorted(read) == sorted(keys), "the ranks' passes are disjoint, and together the client"


@pytest.mark.parametrize("layout", [*MEMBERS, "shard_writer"])
def test_the_samples_are_webdataset_s_own(layout: str, clients: dict[str, Any], tmp_path: Path) -> None:
    data = {"clients": {layout: clients[layout]}, "text_field": "report", "streaming": streaming(tmp_path / "cache")}
    theirs = of_webdataset(clients[layout])
    assert len(theirs) == PAIRS
    assert_the_same(data, layout, theirs, tmp_path)


def hospital(n: int) -> dict[str, bytes]:
    return {**img2dataset(n), f"{n:09d}.json": told(hospital="ab"[n % 3 == 0])}


def test_one_set_split_by_a_field_has_webdataset_s_samples(tmp_path: Path) -> None:
    root = str(write(tmp_path / "set", hospital))
    data = {"root": root, "client_field": "hospital", "streaming": streaming(tmp_path / "cache")}
    for client in "ab":
        theirs = [one for one in of_webdataset(root) if json.loads(one["json"])["hospital"] == client]
        assert len(theirs) == {"a": 24, "b": 12}[client]
        assert_the_same(data, client, theirs, tmp_path)


def by_uid(folder: Path) -> None:
    write(folder, lambda n: {f"1.2.840.{n}.jpg": picture(n), f"1.2.840.{n}.txt": text(n)})


def compressed(folder: Path) -> None:
    for shard in write(folder, img2dataset).glob("*.tar"):
        Path(f"{shard}.gz").write_bytes(gzip.compress(shard.read_bytes()))
        shard.unlink()


def compressed_by_another_name(folder: Path) -> None:
    for shard in write(folder, img2dataset).glob("*.tar"):
        shard.write_bytes(gzip.compress(shard.read_bytes()))


@pytest.mark.parametrize("order", ["exact", "streaming"])
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            by_uid,
            r"00000.tar: has no sample (among its 24 members|of client n: webdataset reads).* e.g. .{,60}2.840.0.jpg",
        ),
        (compressed, r"data.clients.n: .* has no .tar shards; 00000.tar.gz is compressed: unpack it"),
        (
            compressed_by_another_name,
            r"00000.tar: is compressed by gzip, so that no sample .*; unpack it to a plain .tar",
        ),
    ],
)
def test_what_no_sample_can_be_read_of_is_refused_in_a_line(tmp_path: Path, order: str, make: Any, line: str) -> None:
    make(tmp_path / "n")
    data = DataConfig(clients={"n": str(tmp_path / "n")}, order=order, streaming=streaming(tmp_path))
    with pytest.raises(DataError, match=line) as error:
        open_dataset(None, data=data).num_samples("n", "train")
    (problem,) = error.value.problems
    assert len(problem) < 450


def trained(data: dict[str, Any], out: Path, num_ranks: int) -> dict[str, Any]:
    """The one line of metrics.jsonl of a round on that many ranks of one client slot."""
    config = tree(
        out, out / "run", schedule__rounds=1, schedule__stage1_steps=1, schedule__stage2_steps=2, dro__evaluation_pairs=8,
        dro__evaluation_batch_size=3, evaluation__max_pairs=8, topology__ranks_per_slot=num_ranks,
    )  # fmt: skip
    config["data"] = {
        **config["data"],
        "root": None,
        "val_fraction": 0.3,
        "streaming": streaming(out / "cache"),
        **data,
    }
    on_ranks(run_all, num_ranks, config)
    (line,) = metrics_of(out / "run")
    return line


@pytest.mark.parametrize(
    ("num_ranks", "order"),
    [
        pytest.param(1, "exact", marks=pytest.mark.slow),
        pytest.param(2, "streaming", marks=pytest.mark.slow),
        pytest.param(1, "streaming", marks=pytest.mark.exhaustive),
        pytest.param(2, "exact", marks=pytest.mark.exhaustive),
    ],
)
def test_all_layouts_train(num_ranks: int, order: str, clients: dict[str, Any], tmp_path: Path) -> None:
    line = trained({"clients": clients, "text_field": "report", "order": order}, tmp_path, num_ranks)
    assert (tmp_path / "cache" / "indexes").exists() == (order == "exact")
    assert line["client_ids"] == list(clients)
    assert line["excluded_clients"] == []
    assert not any(line["skipped_samples"].values())
    assert all(np.isfinite(line["client_losses"]))
    assert set(line["val"]) == {*clients, "all"}


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "order"), [(1, "exact"), (2, "streaming")])
def test_one_set_split_by_a_field_trains(num_ranks: int, order: str, tmp_path: Path) -> None:
    write(tmp_path / "set", hospital)
    # by the hash of their keys client b has three pairs and more on val's side of a half, and two of 0.3
    data = {"root": str(tmp_path / "set"), "client_field": "hospital", "order": order, "val_fraction": 0.5}
    line = trained(data, tmp_path, num_ranks)
    assert line["client_ids"] == ["a", "b"]
    assert not any(line["skipped_samples"].values())
