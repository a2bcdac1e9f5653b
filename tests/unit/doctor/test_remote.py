"""What `doctor --hostfile` says of hosts; ssh is replaced by a program that runs the same command here."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import TopologyConfig
from feddra_ds.doctor import remote
from feddra_ds.doctor.hosts import hosts_of_file
from feddra_ds.doctor.remote import Seen, Way, findings, look_at, measure, ways_found

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "feddra-ds": "1.0"}
ANSWER: dict[str, Any] = {
    "versions": VERSIONS,
    "digests": {"code": "c0", "config": "c1", "data": "d1"},
    "free": 10**11,
    "is_writable": True,
    "is_port_free": True,
    "interfaces": {"lo": "127.0.0.1", "eth1": "10.0.0.2"},
    "own_address": "10.0.0.2",
}
CONFIG = from_dict({"run": {"output_dir": "run"}, "data": {"root": "data"}})


def seen(**changes: Any) -> Seen:
    """What a probe sees; `changes` are of its answer, `skew_s` and `problem` of itself."""
    own = {name: changes.pop(name) for name in ("skew_s", "problem") if name in changes}
    return Seen(ANSWER | changes, **own)


def lines(hosts: dict[str, Seen], config: Any = CONFIG) -> list[str]:
    return [f"{f.level} {f.what}: {f.found} -> {f.todo}" for f in findings(hosts, config, 29500)]


def test_equal_hosts_have_a_line_each() -> None:
    found = lines({"a": seen(), "b": seen()})
    assert [line.partition(":")[0] for line in found] == ["ok a", "ok b"]
    assert "torch 2.13.0, deepspeed 0.19.8" in found[0]


@pytest.mark.parametrize(
    ("host", "changes", "expected"),
    [
        ("b", {"problem": ("cannot be reached by ssh: timed out", "check the name")},
         "problem b: cannot be reached by ssh: timed out -> check the name"),
        ("b", {"versions": VERSIONS | {"torch": "2.12.0"}}, "problem b: torch 2.12.0, but 2.13.0 on a -> "),
        ("b", {"versions": VERSIONS | {"deepspeed": None}},
         "problem b: deepspeed is not installed for /"),
        ("b", {"digests": {"code": "c9", "config": "c1", "data": "d1"}},
         "problem b: the code of feddra_ds is not the same as on a"),
        ("b", {"digests": {"code": "c0", "config": None, "data": "d1"}},
         "problem b: the config file is not there -> copy it from a"),
        ("b", {"digests": {"code": "c0", "config": "c1", "data": "d2"}},
         "problem b: the dataset of data.root is not the same"),
        ("a", {"is_port_free": False}, "problem a: port 29500, where rank 0 would listen, is taken -> end what listens"),
        ("a", {"is_writable": False}, "problem a: run.output_dir: run cannot be written -> choose"),
        ("a", {"free": 10**6}, "warning a: 1.0 MB free for the run -> make room"),
        ("b", {"own_address": "127.0.1.1"},
         "problem b: its own name means its loopback, which gloo would offer to other hosts -> --topology.interface NAME, "
         "one that all hosts have; here: eth1 (10.0.0.2)"),
        ("b", {"skew_s": -90.0}, "warning b: its clock is 1 min 30 s behind this host's -> let NTP"),
        ("b", {"is_port_free": False, "is_writable": False, "free": 1}, None),  # rank 0 is elsewhere
    ],
)  # fmt: skip
def test_each_problem_is_a_line_that_names_the_host(host: str, changes: dict[str, Any], expected: str | None) -> None:
    hosts = {"a": seen(), "b": seen()} | {host: seen(**changes)}
    found = [line for line in lines(hosts) if not line.startswith("ok")]
    assert len(found) == (expected is not None), found
    if expected is not None:
        assert found[0].startswith(expected)


def test_a_folder_of_data_that_one_host_lacks_is_named() -> None:
    lacks = seen(digests={"code": "c0", "config": "c1", "data": None})
    found = [line for line in lines({"a": seen(), "b": lacks}) if not line.startswith("ok")]
    assert found == [
        "problem b: the dataset of data.root is not there -> copy data.root from a, or name a folder that all hosts have"
    ]
    none = [line for line in lines({"a": lacks, "b": lacks})]
    assert [line.split(" -> ")[0] for line in none] == [
        f"problem {host}: data.root: there is no folder data" for host in "ab"
    ]


def test_an_interface_must_be_on_every_host() -> None:
    config = CONFIG.model_copy(update={"topology": TopologyConfig(interface="eth1")})
    assert len([line for line in lines({"a": seen(), "b": seen()}, config) if line.startswith("ok")]) == 2
    (line,) = [
        line for line in lines({"a": seen(), "b": seen(interfaces={"ib0": "10.1.0.2"})}, config) if "problem" in line
    ]
    assert line == "problem b: topology.interface: eth1 has no IPv4 address there -> choose one of ib0 (10.1.0.2)"


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ssh` that runs the command here, and reaches no host called `gone`."""
    (tmp_path / "ssh").write_text(
        '#!/bin/sh\nfor word; do host=$command; command=$word; done\n'
        '[ "$host" = gone ] && { echo "ssh: no route to gone" >&2; exit 255; }\nexec sh -c "$command"\n'
    )  # fmt: skip
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("ssh")
def test_the_probe_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "north").mkdir(parents=True)
    (tmp_path / "data" / "north" / "index.json").write_text("{}")
    (tmp_path / "c.yaml").write_text("run: {}\n")
    config = from_dict({"run": {"output_dir": str(tmp_path / "runs")}, "data": {"root": str(tmp_path / "data")}})
    with socket.create_server(("", 0)) as server:
        hosts = look_at(["here", "gone"], str(tmp_path / "c.yaml"), config, server.getsockname()[1])
    answer = hosts["here"].answer
    assert answer["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(answer["versions"].values())
    assert all(answer["digests"].values())
    assert (answer["is_port_free"], answer["is_writable"]) == (False, True)
    assert answer["interfaces"]["lo"] == "127.0.0.1"
    assert abs(hosts["here"].skew_s) < 1
    assert hosts["gone"].problem is not None
    assert hosts["gone"].problem[0] == "cannot be reached by ssh: ssh: no route to gone"
    monkeypatch.setattr(sys, "executable", "/no/python")
    problem = look_at(["here"], None, None, 29500)["here"].problem
    assert problem == ("has no /no/python", "make the same environment there, at the same path")
    monkeypatch.setattr(os, "getcwd", lambda: "/no/folder")
    problem = look_at(["here"], None, None, 29500)["here"].problem
    assert problem is not None
    assert problem[0].startswith("has no folder ")


@pytest.mark.usefixtures("ssh")
def test_a_clock_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    script = remote._script().replace('"time": time.time()', '"time": time.time() + 100')
    monkeypatch.setattr(remote, "_script", lambda: script)
    assert look_at(["here"], None, None, 29500)["here"].skew_s == pytest.approx(100, abs=20)


@pytest.mark.usefixtures("ssh")
def test_the_way_to_the_first_host_is_measured() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (refused,) = ways_found(measure(["first", "other"], "127.0.0.1", port), "first")
        assert refused.level == "problem"
        assert f"first could not listen at {port}: " in refused.found
        assert "Address already in use" in refused.found
    began = time.monotonic()
    ways = measure(["first", "other", "gone"], "127.0.0.1", port)
    assert time.monotonic() - began < 60
    assert ways["other"].problem is None
    assert ways["other"].bytes_per_s > 1e6
    assert 0 < ways["other"].round_trip_s < 1
    good, bad = ways_found(ways, "first")
    assert (good.level, bad.level, bad.what) == ("ok", "problem", "gone")
    assert f"it does not reach 127.0.0.1:{port}: ssh: no route to gone" in bad.found
    (said,) = ways_found({"b": Way(1.25e8, 0.1)}, "a")
    assert said.found == "1.00 Gbit/s to a, 100.00 ms there and back"


def test_hostfiles_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--hostfile: there is no file typo"):
        hosts_of_file("typo")
    (tmp_path / "h").write_text("a slots=2\na slots=1\n")
    with pytest.raises(ValueError, match=r"--hostfile: .*h has a more than once"):
        hosts_of_file(str(tmp_path / "h"))
    (tmp_path / "h").write_text("a slots=2\nb slots=1\n")
    assert hosts_of_file(str(tmp_path / "h")) == ["a", "a", "b"]


def test_the_probe_needs_nothing_installed() -> None:
    """It is sent as it is to a Python that may have nothing installed."""
    import ast

    tree = ast.parse(remote._script())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
