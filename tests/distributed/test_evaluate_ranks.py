"""`evaluate` and `embed` over two ranks: each embeds a share, and what comes out is what one process measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from data_helpers import encoded
from run_helpers import add_model, make_config, make_data, make_line, make_run
from spawn import free_port, run_ranks

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.distributed.shares import World
from feddra_ds.evaluation.embeddings import embed
from feddra_ds.evaluation.evaluate import evaluate

OPTIONS: dict[str, Any] = {"bootstrap": 20, "batch_size": 3, "subgroups": ["odd"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained model, beside its data: galleries of 8, 8 and 9 pairs, and one of a single pair."""
    work = tmp_path_factory.mktemp("work")
    config = make_config(work / "run", make_data(work / "data"))
    run = make_run(work / "run", config, [make_line(0)])
    add_model(run / "model", config)
    return run


def of_rank(rank: int, size: int, run: str, out: str) -> list[dict[str, Any]]:
    world = World(rank, size, rank, dist.group.WORLD)
    return [evaluate(run, world=world, compare=run, **OPTIONS), embed(run, out, world=world, batch_size=3)]


def close(a: Any, b: Any, place: str = "") -> None:
    """Equal to 1e-6, all the way down."""
    if isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6), place
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            close(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{place}[{i}]")
    else:
        assert a == b, place


def test_two_ranks_measure_what_one_does(run: Path, tmp_path: Path) -> None:
    first, other = run_ranks(of_rank, 2, str(run), str(tmp_path / "two.safetensors"))
    assert other == [{}, {}], "the first rank alone has the galleries"
    close(first[0], evaluate(run, compare=run, **OPTIONS))
    alone = embed(run, tmp_path / "one.safetensors", batch_size=3)
    close({**first[1], "embeddings": alone["embeddings"]}, alone)

    from safetensors import safe_open

    with safe_open(tmp_path / "one.safetensors", "pt") as one, safe_open(tmp_path / "two.safetensors", "pt") as two:
        assert one.metadata() == two.metadata(), "the same pairs in the same order"
        for name in one.keys():  # noqa: SIM118
            assert (one.get_tensor(name) - two.get_tensor(name)).abs().max() <= 1e-6


def fails_on_one(rank: int, size: int) -> str:
    world = World(rank, size, rank, dist.group.WORLD)

    def make() -> int:
        if rank == 1:
            raise DataError("north: a shard is gone")
        return rank

    with pytest.raises(DataError) as caught:
        world.gather(make)
    assert world.gather(lambda: 10 + rank) == ([10, 11] if rank == 0 else None)
    return str(caught.value)


def test_what_fails_on_one_rank_ends_all_with_its_words() -> None:
    assert run_ranks(fails_on_one, 2) == ["rank 1: north: a shard is gone", "north: a shard is gone"]


def spoilt_on_both(rank: int, size: int, run: str, data: str, share: float) -> str | dict[str, int]:
    from feddra_ds.evaluation.gallery import embed_clients, open_split
    from feddra_ds.evaluation.models import open_models

    models = open_models(run, "cpu")
    assert models.run is not None
    models.run.config["data"]["max_bad_fraction"] = share
    dataset = open_split(models, data, "val", ["bad"])
    world = World(rank, size, rank, dist.group.WORLD) if size > 1 else World()
    try:
        found = embed_clients(
            models, dataset, ["bad"], "val", max_pairs=None, batch_size=4, seed=0, num_workers=0, world=world
        )
    except DataError as error:
        return str(error)
    return {"pairs": len(found["bad"]), **found["bad"].skipped} if found else {}


def test_pairs_that_cannot_be_read_are_counted_over_the_ranks(run: Path, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        for number in range(12):
            image = b"no picture" if number in (2, 5, 9) else encoded(number)
            writer.add("bad", "val", f"{number:04d}", image=image, text=f"report {number}", info={})
    for share in (0.3, 0.2):
        alone = spoilt_on_both(0, 1, str(run), str(tmp_path / "data"), share)
        first, _ = run_ranks(spoilt_on_both, 2, str(run), str(tmp_path / "data"), share)
        assert first == alone
        assert ("3 of its 12 val samples are unreadable" in alone) if share == 0.2 else alone["pairs"] == 9


@pytest.mark.slow
def test_torchrun_starts_evaluate(run: Path, tmp_path: Path) -> None:
    """The command itself on two processes: one output, one evaluation.json, equal to the call's."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [
        "-m",
        "feddra_ds",
        "evaluate",
        str(run),
        "--json",
        "--bootstrap",
        "20",
        "--subgroup",
        "odd",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    close(json.loads(line), evaluate(run, bootstrap=20, subgroups=["odd"]))
    assert json.loads((run / "evaluation.json").read_text()) == json.loads(line)
