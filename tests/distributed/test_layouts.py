"""Shards as other tools leave them: each layout has webdataset's own number of samples and trains, or is refused in a line."""

from __future__ import annotations

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

PAIRS, SHARDS = 36, 3  # of each client, over all its shards
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


def write(folder: Path, members: Members, first: int = 0) -> Path:
    """Three shards of 12 pairs each."""
    folder.mkdir(parents=True)
    per_shard = PAIRS // SHARDS
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as out:
            for n in range(first + shard * per_shard, first + (shard + 1) * per_shard):
                for name, data in members(n).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """data.clients of all layouts."""
    root = tmp_path_factory.mktemp("layouts")
    out: dict[str, Any] = {name: str(write(root / name, members)) for name, members in MEMBERS.items()}

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
    return {"cache_dir": str(cache), "allow_pipe": True, "timeout_s": 30.0}


@pytest.mark.parametrize("layout", MEMBERS)
def test_the_samples_are_webdataset_s_own(layout: str, clients: dict[str, Any], tmp_path: Path) -> None:
    data = DataConfig(clients={layout: clients[layout]}, text_field="report", streaming=streaming(tmp_path))
    samples = open_dataset(None, data=data).samples(layout, "train")
    urls = clients[layout] if isinstance(clients[layout], list) else webdataset.shardlists.expand_urls(clients[layout])
    if urls == [clients[layout]]:
        urls = sorted(str(path) for path in Path(clients[layout]).glob("*.tar"))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert samples.keys == [one["__key__"] for one in theirs]
    assert len(samples) == PAIRS
    assert [samples.read_image(i) for i in range(PAIRS)] == [
        next(one[end] for end in ("jpg", "jpeg", "png", "webp") if end in one) for one in theirs
    ]


def test_a_member_named_by_uid_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "n", lambda n: {f"1.2.840.{n}.jpg": picture(n), f"1.2.840.{n}.txt": text(n)})
    with pytest.raises(
        DataError, match=r"00000.tar: has no sample .*24 members with dots in their names .*1.2.840.0.jpg"
    ):
        open_dataset(None, data=DataConfig(clients={"n": str(tmp_path / "n")}, streaming=streaming(tmp_path))).index(
            "n"
        )


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


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("order", ["exact", "streaming"])
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
    hospital = lambda n: {**img2dataset(n), f"{n:09d}.json": told(hospital="ab"[n % 2])}
    write(tmp_path / "set", hospital)
    line = trained({"root": str(tmp_path / "set"), "client_field": "hospital", "order": order}, tmp_path, num_ranks)
    assert line["client_ids"] == ["a", "b"]
    assert not any(line["skipped_samples"].values())
