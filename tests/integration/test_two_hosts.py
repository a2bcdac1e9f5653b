"""Training over two hosts, namespaces of this machine with a cable between them, under every launcher that has ssh or none."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import metrics_of, on_ranks, run_all, tree, write_dataset, zero
from namespaces import CABLE, HostHere, missing, two_hosts
from spawn import free_port

from feddra_ds.doctor.cost import Link, _all_reduce, seconds_of

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
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"no end within {timeout:.0f} s: {(late.output or b'').decode()}")
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun", "two_hosts.sh"])
def test_every_other_launcher_trains_over_two_hosts_as_over_one(
    hosts: tuple[HostHere, HostHere], data: Path, on_one_host: list[dict[str, Any]], tmp_path: Path, launcher: str
) -> None:
    path, port = config(data, tmp_path), free_port()
    master = ["--master_addr", "hospital-a", "--master_port", port]
    module = ["-m", "feddra_ds", "train", "--config", path]
    torchrun = [BIN / "torchrun", "--nnodes", 2, "--nproc_per_node", 2, *master]
    commands = {
        "no_ssh": [deepspeed(tmp_path, path, "--no_ssh", "--node_rank", node, *master) for node in (0, 1)],
        "torchrun": [[*torchrun, "--node_rank", node, *module] for node in (0, 1)],
        "two_hosts.sh": [["env", "RANKS=2", f"PORT={port}", ROOT / "launch" / "two_hosts.sh",
                          "hospital-a", "hospital-b", "--config", path]],
    }[launcher]  # fmt: skip
    processes = [host.start(command) for host, command in zip(hosts, commands, strict=False)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "".join(said)
    assert_same(metrics_of(tmp_path / "run"), on_one_host)


@pytest.mark.exhaustive
def test_a_cable_that_is_cut_in_a_round_ends_the_run_in_bounded_time_and_it_goes_on(
    hosts: tuple[HostHere, HostHere], data: Path, on_one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    shape = {"clients__timeout_s": 20.0, "clients__minimum": 2}
    command = deepspeed(tmp_path, config(data, tmp_path, **shape), "--master_port", free_port())
    metrics, process = tmp_path / "run" / "metrics.jsonl", hosts[0].start(command)
    try:
        until(lambda: metrics.is_file() and metrics.read_text().endswith("\n"), 240)
        hosts[0].ip("link", "set", CABLE, "down")
        began = time.monotonic()
        said, _ = process.communicate(timeout=200)
        took = time.monotonic() - began
        until(lambda: not trains_on(hosts[1]), 120)
    finally:
        process.kill()
        hosts[0].ip("link", "set", CABLE, "up")
    assert process.returncode != 0
    told = [line for line in said.splitlines() if "rank" in line and ("slot 1" in line or "rank 2" in line)]
    assert told, f"nobody names the slot that was lost: {said}"
    assert "Traceback" not in said
    assert took < 150, f"{took:.0f} s with clients.timeout_s of 20"
    end(hosts[0], command)
    assert_same(metrics_of(tmp_path / "run"), on_one_host)


@pytest.mark.exhaustive
def test_doctor_and_the_launch_name_what_one_host_lacks(
    hosts: tuple[HostHere, HostHere], data: Path, tmp_path: Path
) -> None:
    path, port = config(data, tmp_path), free_port()
    words = ["--no-self-test", "--hostfile", hostfile(tmp_path), "--port", port]
    said = end(hosts[0], [BIN / "feddra-ds", "doctor", "--config", path, *words])
    assert re.search(r"ok +hospital-b: [\d.]+ Gbit/s to hospital-a", said), said
    assert re.search(r"ok +averages: ", said), said

    # a host beside these, and a slot that does not fit
    (tmp_path / "hostfile").write_text("hospital-a slots=2\nhospital-b slots=2\nhospital-c slots=1\n")
    said = end(hosts[0], [BIN / "feddra-ds", "doctor", "--config", path, *words[:2], tmp_path / "hostfile"], code=1)
    assert "hospital-c: cannot be reached by ssh" in said
    assert "5 ranks do not divide into slots of 2" in said

    # a folder that hospital-b does not have: there, an empty one hides it
    hostfile(tmp_path)
    disk = ["nsenter", f"--mount=/proc/{sshd_of(hosts[1])}/ns/mnt"]
    end(hosts[1], [*disk, "mount", "-t", "tmpfs", "none", data])
    try:
        said = end(hosts[0], [BIN / "feddra-ds", "doctor", "--config", path, *words], code=1)
        assert "hospital-b: the dataset of data.root is not the same as on hospital-a" in said
        began = time.monotonic()
        said = end(hosts[0], deepspeed(tmp_path, path, "--master_port", free_port()), code=2)
        assert time.monotonic() - began < 100
        told = [line for line in said.splitlines() if "data.root" in line and "[launch.py" not in line]
        assert len([line for line in told if "on hospital-b (rank " in line]) == 1, said
    finally:
        end(hosts[1], [*disk, "umount", data])


SUMS = """
import json, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist

rank = int(sys.argv[1])
store = dist.TCPStore("hospital-a", int(sys.argv[2]), 2, rank == 0, timedelta(seconds=120))
peers = dist.ProcessGroupGloo(dist.PrefixStore("peers", store), rank, 2, timedelta(seconds=120))
took = {}
for num_bytes in map(int, sys.argv[3:]):
    for _ in range(3):
        time.sleep(4)  # the connection rests, as it does while clients train
        tensor = torch.ones(num_bytes // 4)
        peers.barrier().wait()
        began = time.perf_counter()
        peers.allreduce([tensor]).wait()
        took.setdefault(num_bytes, []).append(time.perf_counter() - began)
print(json.dumps({num_bytes: sorted(times)[1] for num_bytes, times in took.items()}))
"""


@pytest.mark.exhaustive
def test_over_a_far_link_sums_take_what_the_cost_model_says(tmp_path: Path) -> None:
    """1 Gbit/s and 50 ms: small and large tensors, whose time is round trips, TCP's start, and bytes. Needs a core of its own."""
    sizes, port = (4096, 1 << 18, 1 << 22, 1 << 26), free_port()
    with two_hosts(tmp_path / "ssh", slow=(0.05, 1e9), OMP_NUM_THREADS="1") as far:
        ranks = [host.start([sys.executable, "-c", SUMS, rank, port, *sizes]) for rank, host in enumerate(far)]
        said = [process.communicate(timeout=400)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    measured = {int(size): took for size, took in json.loads(said[0].splitlines()[-1]).items()}
    expected = {size: seconds_of(_all_reduce(size, 2), Link(1e9 / 8, 0.05), 1, 1) for size in sizes}
    assert measured == pytest.approx(expected, rel=0.25)


def sshd_of(host: HostHere) -> str:
    """The process of a host's ssh server, whose view of the disk its sessions share."""
    found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    commands = {pid: Path("/proc", pid, "cmdline").read_bytes() for pid in found.stdout.split()}
    return next(pid for pid, words in commands.items() if b"sshd" in words and b"-f" in words)


def trains_on(host: HostHere) -> bool:
    """Whether a rank is left there."""
    found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        with contextlib.suppress(OSError):
            if b"train.py" in Path("/proc", pid, "cmdline").read_bytes():
                return True
    return False


def until(is_so: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
