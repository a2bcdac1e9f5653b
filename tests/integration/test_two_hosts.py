"""Training over two hosts, namespaces of this machine with a cable between them, under every launcher that has ssh or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import metrics_of, on_ranks, run_all, tree, write_dataset, zero
from namespaces import HostHere, missing, two_hosts
from spawn import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
CLIENTS = {"north": 16, "south": 16}
LAYOUT = {"topology__ranks_per_slot": 2, "deepspeed": zero(3), "clients__timeout_s": 120.0}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HostHere, HostHere]]:
    path = f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
    with two_hosts(tmp_path_factory.mktemp("ssh"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PATH=path) as both:
        yield both


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("two") / "data", CLIENTS)


@pytest.fixture(scope="module")
def on_one_host(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rounds of 2 slots × 2 ranks on one host."""
    out = tmp_path_factory.mktemp("two") / "one"
    on_ranks(run_all, 4, tree(data, out, **LAYOUT), True)
    return metrics_of(out)


def hostfile(folder: Path) -> Path:
    """Two ranks on each host."""
    (folder / "hostfile").write_text("hospital-a slots=2\nhospital-b slots=2\n")
    return folder / "hostfile"


def config(data: Path, folder: Path, **changes: Any) -> Path:
    """A config file of 2 slots × 2 ranks at ZeRO 3, which writes into folder/run."""
    (folder / "config.yaml").write_text(yaml.safe_dump(tree(data, folder / "run", **{**LAYOUT, **changes})))
    return folder / "config.yaml"


def deepspeed(folder: Path, path: Path, *more: Any) -> list[Any]:
    return [BIN / "deepspeed", "--hostfile", hostfile(folder), *more, ROOT / "launch" / "train.py", "--config", path]


def end(host: HostHere, command: Sequence[Any], *, code: int = 0, timeout: float = 240) -> str:
    """What a command said; it must end with this code."""
    process = host.start(command)
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, said
    return said


@pytest.mark.slow
def test_deepspeeds_hostfile_trains_over_two_hosts_as_over_one(
    hosts: tuple[HostHere, HostHere], data: Path, on_one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    said = end(hosts[0], deepspeed(tmp_path, config(data, tmp_path), "--master_port", free_port()))
    assert_same(metrics_of(tmp_path / "run"), on_one_host)
    rows = [line.split() for line in said.splitlines() if " cpu " in line]
    places = [row[row.index("cpu") - 2 : row.index("cpu") + 3] for row in rows]
    assert places[:4] == [
        ["0", "hospital-a", "cpu", "0", "0"],
        ["1", "hospital-a", "cpu", "0", "1"],
        ["2", "hospital-b", "cpu", "1", "0"],
        ["3", "hospital-b", "cpu", "1", "1"],
    ], said


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """All numbers of two runs' metrics within 1e-6 of each other, all else equal."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6), place
    else:
        assert found == expected, place
