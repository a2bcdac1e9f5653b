"""Streaming over 2 ranks × 2 decode workers from a server that fails every third request: everything, once, and no more."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from spawn import run_ranks

PAIRS = {"mine": 96, "other": 24}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for) of a flaky server with two clients in many small shards."""
    from feddra_ds.data.format.writer import DatasetWriter

    root = tmp_path_factory.mktemp("served") / "data"
    with DatasetWriter(root, max_shard_bytes=16_000) as writer:
        for client, count in PAIRS.items():
            for number in range(count):
                out = io.BytesIO()
                Image.fromarray(np.full((12, 12), number * 2, dtype=np.uint8)).save(out, "PNG")
                writer.add(
                    client,
                    "train",
                    f"{client}{number}",
                    image=out.getvalue(),
                    suffix="png",
                    text=f"report {number}",
                    info={},
                )
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) % 3 == 0:
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


def stream_one_pass(rank: int, world_size: int, address: str, cache: str) -> dict[str, Any]:
    """What this rank reads until its readers have passed once over their shards."""
    from feddra_ds.config.schema import DataConfig, StreamingConfig
    from feddra_ds.data.format.dataset import open_dataset
    from feddra_ds.data.loading.order import Position
    from feddra_ds.data.loading.pool import DecodePool
    from feddra_ds.data.loading.streaming import build_data
    from feddra_ds.data.loading.tokens import load_tokenizer

    options = StreamingConfig(timeout_s=10, cache_dir=cache, shuffle_buffer=10)
    dataset = open_dataset(address, options=options)
    config = DataConfig(order="streaming", batch_size=4, image_size=8, text_length=8, num_workers=2)
    with DecodePool(2, 2, timeout_s=60) as pool:
        data = build_data(
            dataset, ["mine"], "train", config=config, seed=1, tokenizer=load_tokenizer(None), image_mean=(0.5,) * 3,
            image_std=(0.5,) * 3, slot_rank=rank, ranks_per_slot=world_size, pool=pool,
        )  # fmt: skip
        order = data.source.order
        steps = [order.advance(Position(), step) for step in range(60)]
        first_pass = [[data.source.key(int(s)) for e, s in order.batch(p) if e == 0] for p in steps]
        read = [batch.keys for batch in data.batches(Position(), 60)]
        replay = [batch.keys for batch in data.batches(steps[7], 5)]
    return {
        "split": order.split,
        "first_pass": first_pass,
        "read": read,
        "replay": replay,
        "skipped": data.take_skipped(),
    }


def test_two_ranks_of_two_workers_share_the_client_s_shards(served: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = served
    ranks = run_ranks(stream_one_pass, 2, address, str(tmp_path / "cache"))
    split = ranks[0]["split"]
    assert split == ranks[1]["split"]
    assert split is not None
    assert len(split) == 4
    shards = [shard for own in split for shard in own]
    assert sorted(shards) == list(range(len(shards))), "disjoint, and together all"

    keys = [key for rank in ranks for step in rank["first_pass"] for key in step]
    assert sorted(keys) == sorted(f"mine{n}" for n in range(96)), "one pass is every sample once"
    readers = {(r, step % 2): set() for r in range(2) for step in range(2)}
    for r, rank in enumerate(ranks):
        for step, (planned, read) in enumerate(zip(rank["first_pass"], rank["read"], strict=True)):
            assert set(planned) <= set(read), "what is read is what the order says"
            readers[r, step % 2] |= set(read)
        assert rank["replay"] == rank["read"][7:12]
        assert rank["skipped"] == {}
    owned = list(readers.values())
    assert all(not a & b for i, a in enumerate(owned) for b in owned[:i]), "no reader reads another's samples"
    assert any(path.startswith("/mine/") for path in asked)
    assert not any(path.startswith("/other/") and path.endswith(".tar") for path in asked), (
        "other clients stay untouched"
    )
