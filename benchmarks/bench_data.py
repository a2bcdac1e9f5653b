"""Pairs per second of the loader against plain webdataset over the same shards, texts and augmentation.

    python benchmarks/bench_data.py [--pairs 1200] [--stored 512] [--size 224] [--workers 0,1,2] [--repeats 5] [--quick]
                                    [--http] [--read]

Radiograph-like JPEGs of `stored` pixels with reports, one client. Cases per number of worker processes, interleaved:
    webdataset   WebDataset → shuffle → decode("pil") → random resized crop with Pillow, /255, normalise, tokenize with
                 the same fast tokenizer → batched, in a WebLoader; 0 workers: in the calling process
    exact        ClientData, order by offset; 0 workers: a background thread
    streaming    StreamingData over the same shards
With --http the shards come from a server of their own on this machine, through a cache that keeps nothing; no case exact.
With --read nothing is decoded: a pass of raw samples, webdataset's and streaming's, through the same shuffle in this process.
Else each case makes the batches of one pass as normalised fp32 tensors, as training takes them. Prints a table of ratios
(above 1 is faster than webdataset) and appends a row a case to results/data.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import append_row, interleaved_seconds, median_ratio, quantiles
from _runs import print_table
from PIL import Image

from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.stream import Stream
from feddra_ds.data.loading.streaming import build_data
from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.data.synthetic.image import render
from feddra_ds.data.synthetic.reports import write_report
from feddra_ds.data.synthetic.scene import SITES, draw_study, generator

TEXT_LENGTH, HALF, AREA = 112, (0.5, 0.5, 0.5), 0.6


def write_data(root: Path, pairs: int, stored: int) -> Dataset:
    """One client of JPEG pictures, `stored` pixels a side, in about eight shards."""
    pictures = []
    for number in range(min(pairs, 60)):  # drawing is slow, and what is in the pictures does not matter
        study = draw_study(SITES[number % 5], f"p{number}", generator(number))
        pixels = render(
            study, SITES[number % 5].scanner, min(stored, 256), generator("b", number), generator("f", number)
        )
        out = io.BytesIO()
        Image.fromarray(pixels).resize((stored, stored)).convert("RGB").save(out, "JPEG", quality=90)
        pictures.append((out.getvalue(), write_report(study, SITES[number % 5].style, generator(number))))
    size = sum(len(image) for image, _ in pictures) // len(pictures)
    with DatasetWriter(root, max_shard_bytes=max(1 << 16, (size + 4096) * pairs // 8)) as writer:
        for number in range(pairs):
            image, text = pictures[number % len(pictures)]
            writer.add("client", "train", f"k{number:06d}", image=image, text=f"{text} {number}", info={"labels": {}})
    return open_dataset(root)


class Transform:
    """What a plain webdataset user writes: Pillow, numpy and the tokenizer."""

    def __init__(self, size: int):
        self.size = size
        self.tokenizer = load_tokenizer(None)

    def __call__(self, sample: tuple[Image.Image, str]) -> tuple[np.ndarray, list[int]]:
        image, text = sample
        draw = np.random.default_rng()
        side = float(np.sqrt(draw.uniform(AREA, 1)))
        left, top = (draw.uniform(0, (1 - side) * length) for length in image.size)
        box = (left, top, left + side * image.width, top + side * image.height)
        pixels = np.asarray(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        values = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
        ids = self.tokenizer(text, truncation=True, padding="max_length", max_length=TEXT_LENGTH).input_ids
        return np.ascontiguousarray(values.transpose(2, 0, 1)), ids


def webdataset_pass(paths: list[str], size: int, batch: int, workers: int) -> Callable[[], int]:
    import webdataset as wds

    transform = Transform(size)

    def run() -> int:
        dataset = wds.WebDataset(paths, shardshuffle=len(paths), nodesplitter=wds.single_node_only, empty_check=False)
        dataset = (
            dataset.shuffle(1000).decode("pil").to_tuple("jpg", "txt").map(transform).batched(batch, partial=False)
        )
        pairs = 0
        for images, ids in wds.WebLoader(dataset, num_workers=workers, batch_size=None):
            torch.as_tensor(np.asarray(images)), torch.as_tensor(np.asarray(ids))
            pairs += len(images)
        return pairs

    return run


def own_pass(dataset: Dataset, order: str, size: int, batch: int, pool: DecodePool, steps: int) -> Callable[[], int]:
    config = DataConfig(
        order=order, batch_size=batch, image_size=size, text_length=TEXT_LENGTH, num_workers=pool.num_workers,
        augment={"crop_scale": AREA, "brightness": 0.0},
    )  # fmt: skip
    data = build_data(
        dataset,
        ["client"],
        "train",
        config=config,
        seed=0,
        tokenizer=load_tokenizer(None),
        image_mean=HALF,
        image_std=HALF,
        pool=pool,
    )
    position = [Position()]

    def run() -> int:
        pairs = 0
        for step in data.batches(position[0], steps):
            pairs += len(step.pixel_values)
        position[0] = data.advance(position[0], steps)
        return pairs

    return run


def read_cases(dataset: Dataset) -> dict[str, Callable[[], int]]:
    """A pass of raw samples through a shuffle of 1000."""
    import webdataset as wds

    shards, passes = dataset.stream("client", "train"), itertools.count()

    def theirs() -> int:
        source = wds.WebDataset(shards.places, shardshuffle=len(shards.places), empty_check=False)
        return sum(1 for _ in source.shuffle(1000))

    def own() -> int:
        return len(Stream([shards], next(passes), buffer=1000).sample(None))

    return {"webdataset": theirs, "streaming": own}


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a server of the folder, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def measure(args: argparse.Namespace, dataset: Dataset, workers: int) -> list[dict[str, Any]]:
    paths = dataset.stream("client", "train").places
    orders = ("streaming",) if args.http else ("exact", "streaming")
    steps = args.pairs // args.batch
    with DecodePool(workers, 2) as pool:
        if args.read:
            cases = read_cases(dataset)
        else:
            cases = {"webdataset": webdataset_pass(paths, args.size, args.batch, workers)}
            cases |= {name: own_pass(dataset, name, args.size, args.batch, pool, steps) for name in orders}
        counted: dict[str, int] = {}
        runs = {
            name: partial(lambda name, case: counted.__setitem__(name, case()), name, case)
            for name, case in cases.items()
        }
        seconds = interleaved_seconds(runs, "cpu", args.repeats)
    rows = []
    for name, times in seconds.items():
        # webdataset drops each worker's last part of a batch: compare pairs per second, not passes
        rate = [counted[name] / t for t in times]
        reference = [counted["webdataset"] / t for t in seconds["webdataset"]]
        sizes = {"stored": args.stored, "size": args.size, "batch": args.batch}
        speed = {"pairs_per_s": round(quantiles(rate)["p50"], 1), "ratio": round(median_ratio(rate, reference), 3)}
        case = f"{name}{' read' if args.read else ''}{' http' if args.http else ''}"
        rows.append({"workers": workers, "case": case, **sizes, **speed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1200)
    parser.add_argument("--stored", type=int, default=512, help="side in pixels of the stored pictures")
    parser.add_argument("--size", type=int, default=224, help="side in pixels of the model's pictures")
    parser.add_argument("--batch", type=int, default=72)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--http", action="store_true", help="over HTTP instead of from the disk")
    parser.add_argument("--read", action="store_true", help="reading alone; nothing is decoded")
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that the script works")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.stored, args.size, args.batch, args.workers, args.repeats = 64, 64, 32, 8, "0,1", 1
    if args.read:
        args.workers = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        root = Path(folder) / "data"
        dataset = write_data(root, args.pairs, args.stored)
        with served(root) if args.http else contextlib.nullcontext() as address:
            if address is not None:
                nothing_kept = {"cache_dir": f"{folder}/cache", "cache_bytes": 0}
                shards = [f"{address}/client/{Path(path).name}" for path in dataset.stream("client", "train").places]
                config = DataConfig(clients={"client": shards}, order="streaming", streaming=nothing_kept)
                dataset = open_dataset(None, data=config)
            rows = [row for workers in args.workers.split(",") for row in measure(args, dataset, int(workers))]
    print_table(rows)
    for row in rows:
        if not args.quick:
            append_row("data", row, "cpu")


if __name__ == "__main__":
    main()
