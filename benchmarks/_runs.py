"""What the benchmarks of rounds share: a dual encoder of 12 + 12 layers, synthetic clients, and launches of several ranks."""

from __future__ import annotations

import atexit
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import _common
import numpy as np
from PIL import Image

from feddra_ds.common.tree import set_path
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.data.format.writer import DatasetWriter

WORDS = ("opacity", "effusion", "nodule", "left", "right", "base", "apex", "small", "large", "clear", "normal", "chest")


@dataclass(frozen=True)
class Sizes:
    """A dual encoder and its batches. The alignment module is the top block of each encoder and an mlp head."""

    layers: int = 12  # of each encoder
    hidden: int = 128
    heads: int = 4
    image_size: int = 64
    patch: int = 8
    text_length: int = 48
    batch: int = 16
    head_hidden: int = 256
    embedding: int = 64


FULL = Sizes()
QUICK = Sizes(layers=2, hidden=32, heads=2, image_size=32, text_length=16, batch=4, head_hidden=32, embedding=16)


def write_clients(root: Path, num_clients: int, num_pairs: int, sizes: Sizes) -> Path:
    """A dataset of noise images with reports that fill the text length; num_pairs training pairs a client."""
    draw = np.random.default_rng(0)
    with DatasetWriter(root) as writer:
        for client in range(num_clients):
            for index in range(num_pairs + 4):
                pixels = draw.integers(0, 256, (sizes.image_size, sizes.image_size, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, format="PNG")
                writer.add(
                    f"client-{client:03d}",
                    "train" if index < num_pairs else "val",
                    f"{client:03d}-{index:05d}",
                    image=file.getvalue(),
                    suffix="png",
                    text=" ".join(draw.choice(WORDS, sizes.text_length)),
                )
    return root


def config_tree(root: Path, out: Path, sizes: Sizes, **changes: Any) -> dict[str, Any]:
    """A nested config; `changes` are dotted keys with `__` for the dot."""
    encoder = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": 4 * sizes.hidden,
    }
    tree: dict[str, Any] = {
        "objective": {"learnable_temperature": True},
        "run": {"output_dir": str(out), "device": "cpu", "trackers": []},
        "model": {
            "vision": {"config": {"model_type": "vit", "patch_size": sizes.patch, **encoder}},
            "text": {"config": {"model_type": "bert", **encoder}},
            "embedding_dim": sizes.embedding,
            "head": {"hidden_dim": sizes.head_hidden},
        },
        "data": {
            "root": str(root),
            "batch_size": sizes.batch,
            "image_size": sizes.image_size,
            "text_length": sizes.text_length,
        },
        "dro": {"evaluation_pairs": sizes.batch, "evaluation_batch_size": sizes.batch},
        "optimizer": {"lr": 1e-4},
        "evaluation": {"every": 0},
        "clients": {"timeout_s": 300.0},
    }
    for key, value in changes.items():
        set_path(tree, key.replace("__", "."), value)
    return tree


def make_config(*arguments: Any, **changes: Any) -> Config:
    """The validated config of `config_tree`."""
    return from_dict(config_tree(*arguments, **changes))


def answer(result: Any) -> NoReturn:
    """Print what `launch` reads and end this rank at once: its peers may be gone, and there is nothing to wait for."""
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)


def launch(script: str, world_size: int, argument: Mapping[str, Any], timeout: float = 1800) -> list[Any]:
    """`script --child JSON` on `world_size` ranks of this host: what each printed last, parsed as JSON, by rank.

    Raises RuntimeError with a rank's output when one fails, and subprocess.TimeoutExpired; no rank outlives either.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, script, "--child", json.dumps(argument)]
    ranks, logs = [], []
    try:
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            environment = os.environ | {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            if sys.platform == "linux":
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below)
            logs.append(log)
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True))
        results = []
        for rank, process in enumerate(ranks):
            printed, _ = process.communicate(timeout=timeout)
            if process.returncode != 0:
                logs[rank].seek(0)
                raise RuntimeError(f"{script}, rank {rank} of {world_size}: {logs[rank].read()[-4000:]}")
            results.append(json.loads(printed.strip().splitlines()[-1]))
        return results
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for log in logs:
            log.close()


def discard_results() -> None:
    """Let this process's rows go to a folder that ends with it: a smoke test measures nothing."""
    folder = tempfile.TemporaryDirectory(prefix="results-")
    atexit.register(folder.cleanup)
    _common.RESULTS = Path(folder.name)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same columns, aligned; numbers to four digits."""
    columns = list(rows[0])
    cells = [[f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        padded = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *padded]))


def linear_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Intercept, slope and R² of y over x, least squares."""
    slope, intercept = statistics.linear_regression(x, y)
    return intercept, slope, statistics.correlation(x, y) ** 2
