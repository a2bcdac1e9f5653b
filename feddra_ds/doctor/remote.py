"""The hosts of a hostfile, looked at over ssh as a launch would meet them: what differs, what is missing, how fast the way is."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddra_ds.common.text import duration, listed, printable, size
from feddra_ds.config.schema import Config
from feddra_ds.doctor import probe
from feddra_ds.doctor.finding import Finding

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_NO_FOLDER, _NO_PYTHON, _UNREACHABLE = 97, 98, 255
_SKEW_S = 2.0
_LITTLE_DISK = 2_000_000_000
_AT_ONCE = 32


@dataclass(frozen=True)
class Seen:
    """A host as its probe saw it. problem: why there is no answer; skew_s: how far its clock is ahead of ours."""

    answer: dict[str, Any]
    skew_s: float = 0.0
    problem: tuple[str, str] | None = None  # what was found, what to do


@dataclass(frozen=True)
class Way:
    """From a host to the first one: bytes a second, seconds of a round trip; or why neither is known."""

    bytes_per_s: float = 0.0
    round_trip_s: float = 0.0
    problem: str | None = None


def look_at(hosts: Sequence[str], config_path: str | None, config: Config | None, port: int) -> dict[str, Seen]:
    """What each host's probe saw, by name, within about 30 s."""
    root = None if config is None or config.data.root is None or "://" in config.data.root else config.data.root
    asked = {
        "config": config_path if config_path is not None and Path(config_path).is_file() else None,
        "data": root,
        "out": "." if config is None else config.run.output_dir,
        "port": port,
    }
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(hosts, pool.map(lambda host: _look(host, asked), hosts), strict=True))


def findings(seen: dict[str, Seen], config: Config | None, port: int) -> Iterator[Finding]:
    """A line for each problem of each host, and one for each host without. Others are compared with the first that answers."""
    answers = {host: one.answer for host, one in seen.items() if one.problem is None}
    first = next(iter(answers), "")
    for host, one in seen.items():
        if one.problem is not None:
            yield Finding("problem", host, *one.problem)
            continue
        problems = [*_differences(host, one.answer, first, answers[first])]
        problems += _alone(host, one, config, port, is_master=host == next(iter(seen)), num_hosts=len(seen))
        root = None if config is None or config.data.root is None or "://" in config.data.root else config.data.root
        if root is not None and answers[first]["digests"]["data"] is None and one.answer["digests"]["data"] is None:
            problems.append(Finding("problem", host, f"data.root: there is no folder {root}", "copy the shards there"))
        yield from problems
        if not problems:
            versions = ", ".join(f"{name} {version}" for name, version in one.answer["versions"].items())
            yield Finding("ok", host, f"{versions}; {size(one.answer['free'])} free for the run")


def _differences(host: str, answer: dict[str, Any], first: str, other: dict[str, Any]) -> Iterator[Finding]:
    todo = f"make it the environment of {first} (pip install -c constraints.txt), at the same path"
    for name, version in answer["versions"].items():
        theirs = other["versions"][name]
        if version is None:
            yield Finding("problem", host, f"{name} is not installed for {sys.executable}", todo)
        elif version != theirs:
            yield Finding("problem", host, f"{name} {version}, but {theirs} on {first}", todo)
    todos = {
        "code": f"bring the checkout of {first} there",
        "config": f"copy it from {first}, to the same path",
        "data": f"copy data.root from {first}, or name a folder that all hosts have",
    }
    for name, todo in todos.items():
        here, theirs = answer["digests"][name], other["digests"][name]
        if here is None and theirs is not None:
            yield Finding("problem", host, f"{_NAMES[name]} is not there", todo)
        elif here != theirs and theirs is not None:
            yield Finding("problem", host, f"{_NAMES[name]} is not the same as on {first}", todo)


_NAMES = {"code": "the code of feddra_ds", "config": "the config file", "data": "the dataset of data.root"}


def _alone(
    host: str, seen: Seen, config: Config | None, port: int, *, is_master: bool, num_hosts: int
) -> Iterator[Finding]:
    """What is wrong with a host by itself."""
    answer, interfaces = seen.answer, seen.answer["interfaces"]
    if is_master and not answer["is_port_free"]:
        todo = "end what listens there, or take another: --port here, --master_port of deepspeed"
        yield Finding("problem", host, f"port {port}, where rank 0 would listen, is taken", todo)
    if is_master and not answer["is_writable"]:
        out = "." if config is None else config.run.output_dir
        yield Finding("problem", host, f"run.output_dir: {out} cannot be written", "choose another folder")
    if is_master and answer["free"] < _LITTLE_DISK:
        yield Finding(
            "warning", host, f"{size(answer['free'])} free for the run", "make room, or lower checkpoint.keep"
        )
    wanted = None if config is None else config.topology.interface
    usable = [f"{name} ({address})" for name, address in interfaces.items() if not address.startswith("127.")]
    if wanted is not None and wanted not in interfaces:
        todo = f"choose one of {listed(usable, 8)}"
        yield Finding("problem", host, f"topology.interface: {wanted} has no IPv4 address there", todo)
    elif wanted is None and num_hosts > 1 and (answer["own_address"] or "127.").startswith("127."):
        todo = f"--topology.interface NAME, one that all hosts have; here: {listed(usable, 8)}"
        yield Finding("problem", host, "its own name means its loopback, which gloo would offer to other hosts", todo)
    if abs(seen.skew_s) > _SKEW_S:
        which = "ahead of" if seen.skew_s > 0 else "behind"
        found = f"its clock is {duration(abs(seen.skew_s))} {which} this host's"
        yield Finding("warning", host, found, "let NTP set the clocks: logs and locks compare times")


def measure(hosts: Sequence[str], address: str, port: int) -> dict[str, Way]:
    """The way from each host beside the first one to `address`, the first one's, where it listens for a moment."""
    others = hosts[1:]
    listener = subprocess.Popen(
        _command(hosts[0], ["listen", str(port), str(len(others))]),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert listener.stdin is not None
        assert listener.stdout is not None
        listener.stdin.write(_script())
        listener.stdin.close()
        if listener.stdout.readline().strip() != "ready":
            assert listener.stderr is not None
            return dict.fromkeys(
                others, Way(problem=f"{hosts[0]} could not listen at {port}: {_last(listener.stderr.read())}")
            )
        return {host: _way(host, address, port) for host in others}  # in turn: they would share the first one's link
    finally:
        listener.kill()
        listener.wait()


def _way(host: str, address: str, port: int) -> Way:
    done = _ssh(host, ["send", address, str(port)], timeout_s=100.0)
    if done is None or done.returncode != 0:
        said = "no answer within 100 s" if done is None else _last(done.stderr)
        return Way(problem=f"it does not reach {address}:{port}: {said}")
    return Way(**json.loads(done.stdout))


def ways_found(ways: dict[str, Way], first: str) -> Iterator[Finding]:
    """A line for each way."""
    for host, way in ways.items():
        if way.problem is not None:
            todo = f"open that port of {first} for it, or name the right network: topology.interface"
            yield Finding("problem", host, way.problem, todo)
        else:
            speed, trip = way.bytes_per_s * 8 / 1e9, way.round_trip_s * 1e3
            yield Finding("ok", host, f"{speed:.2f} Gbit/s to {first}, {trip:.2f} ms there and back")


def _look(host: str, asked: dict[str, Any]) -> Seen:
    began = time.time()
    done = _ssh(host, ["look", json.dumps(asked)], timeout_s=30.0)
    ended = time.time()
    if done is None:
        return Seen({}, problem=("gives no answer by ssh within 30 s", f"try: ssh {host} true"))
    if done.returncode == 0:
        answer = json.loads(done.stdout.splitlines()[-1])
        return Seen(answer, answer["time"] - (began + ended) / 2 if not began <= answer["time"] <= ended else 0.0)
    if done.returncode == _NO_FOLDER:
        return Seen(
            {}, problem=(f"has no folder {Path.cwd()}, in which the ranks would start", "bring the checkout there")
        )
    if done.returncode == _NO_PYTHON:
        return Seen({}, problem=(f"has no {sys.executable}", "make the same environment there, at the same path"))
    if done.returncode == _UNREACHABLE:
        todo = f"ssh {host} true must work here without a password; check the name, or take it out of the hostfile"
        return Seen({}, problem=(f"cannot be reached by ssh: {_last(done.stderr)}", todo))
    return Seen(
        {}, problem=(f"{sys.executable} fails there: {_last(done.stderr)}", f"try: ssh {host} {sys.executable} -V")
    )


def _ssh(host: str, words: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str] | None:
    """The probe's outcome; None after timeout_s."""
    try:
        return subprocess.run(_command(host, words), input=_script(), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _command(host: str, words: Sequence[str]) -> list[str]:
    """As the deepspeed launcher starts ranks: in this folder, with this Python and its variables."""
    exports = "".join(f"export {k}={shlex.quote(v)}; " for k, v in os.environ.items() if k.startswith("PYTHON"))
    python = shlex.quote(sys.executable)
    inside = (
        f"cd {shlex.quote(os.getcwd())} 2>/dev/null || exit {_NO_FOLDER}; test -x {python} || exit {_NO_PYTHON}; "
        f"{exports}exec {python} - {shlex.join(words)}"
    )
    return [*_SSH, host, inside]


def _script() -> str:
    return Path(probe.__file__).read_text(encoding="utf-8")


def _last(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return printable(lines[-1].strip()) if lines else "it said nothing"
