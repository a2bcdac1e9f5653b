"""Streaming over two ranks from a server that fails every fifth request: everything, once, and no more, after a kill too."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from spawn import run_ranks

PAIRS = {"mine": 240, "other": 8}
SHARDS = 24  # of mine
PER_SHARD = PAIRS["mine"] // SHARDS


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for) of a flaky server with two clients in many small shards."""
    root = tmp_path_factory.mktemp("served") / "data"
    for client, count in PAIRS.items():
        (root / client).mkdir(parents=True)
        for number in range(count):
            shard = root / client / f"train-{number // PER_SHARD:06d}.tar"
            picture = io.BytesIO()
            Image.fromarray(np.full((12, 12), number, dtype=np.uint8)).save(picture, "PNG")
            with tarfile.open(shard, "a") as out:
                for suffix, data in (("png", picture.getvalue()), ("txt", f"report {number}".encode())):
                    member = tarfile.TarInfo(f"{client}{number}.{suffix}")
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) % 5 == 0:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def read_batches(
    rank: int, world_size: int, address: str, cache: str, first: int, num: int, num_workers: int
) -> list[list[str]]:
    """The keys of this rank's part of `num` batches, from the batch number `first` on."""
    from feddra_ds.config.schema import DataConfig
    from feddra_ds.data.format.dataset import open_dataset
    from feddra_ds.data.loading.order import Position
    from feddra_ds.data.loading.pool import DecodePool
    from feddra_ds.data.loading.streaming import build_data
    from feddra_ds.data.loading.tokens import load_tokenizer

    # a cache that keeps nothing: what is read is asked for
    options = {"timeout_s": 10, "cache_dir": cache, "cache_bytes": 0, "shuffle_buffer": 10}
    config = DataConfig(
        clients={"mine": f"{address}/mine/train-{{000000..{SHARDS - 1:06d}}}.tar", "other": f"{address}/other/train-000000.tar"},
        order="streaming", batch_size=8, image_size=8, text_length=8, num_workers=num_workers, streaming=options,
    )  # fmt: skip
    dataset = open_dataset(None, data=config)
    with DecodePool(num_workers, 1, timeout_s=60) as pool:
        data = build_data(
            dataset, ["mine"], "train", config=config, seed=1, tokenizer=load_tokenizer(None), image_mean=(0.5,) * 3,
            image_std=(0.5,) * 3, slot_rank=rank, ranks_per_slot=world_size, pool=pool,
        )  # fmt: skip
        return [batch.keys for batch in data.batches(data.advance(Position(), first), num)]


@pytest.mark.slow
def test_two_ranks_share_a_client_without_an_index_and_go_on_where_they_were(
    served: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = served
    cache = str(tmp_path / "cache")
    whole = run_ranks(read_batches, 2, address, cache, 0, 34, 0)
    passes = [[key for batch in rank for key in batch] for rank in whole]
    assert [len(set(keys[:120])) for keys in passes] == [120, 120], "thirty batches of four are a pass of each rank"
    assert not set(passes[0]) & set(passes[1]), "disjoint"
    assert set(passes[0]) | set(passes[1]) == {f"mine{n}" for n in range(240)}, "and together the client"
    assert not any(path.startswith("/other/") or path.endswith(".json") for path in asked)

    asked.clear()
    again = run_ranks(read_batches, 2, address, cache, 15, 1, 2)
    assert again == [rank[15:16] for rank in whole], "the same after a kill, whatever the number of workers"
    shard_of = lambda key: int(key.removeprefix("mine")) // PER_SHARD
    fetched = {int(path[-10:-4]) for path in asked}
    for rank in whole:
        taken = Counter(shard_of(key) for batch in rank[:15] for key in batch)
        consumed = {shard for shard, count in taken.items() if count == PER_SHARD}
        assert len(consumed) > 1, (
            "half a pass has consumed whole shards, and what is read ahead ends before the next pass"
        )
        assert not consumed & fetched, "which are not asked for again"
