"""Two hosts on one machine: network namespaces joined by a cable (veth), each with its name, its addresses and an sshd.

`with two_hosts(folder) as hosts: hosts[0].start([...])`. A process there sees the network, the host name, /etc/hosts and
the ssh client's settings of that host, and the disk of the machine. Needs root, iproute2, openssh-server and pdsh;
`missing()` says what of it is not here. Nothing outside the namespaces is changed but /etc/netns, where `ip netns exec`
looks for a namespace's own files; it is cleaned afterwards, and every process of the namespaces is ended.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("hospital-a", "hospital-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
CABLE = "eth0"  # its end on either host
SSHD = "/usr/sbin/sshd"
_numbers = itertools.count()


def missing() -> str | None:
    """Why there can be no two hosts here, or None."""
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    tools = ("ip", "pdsh", "ssh", "ssh-keygen", SSHD)
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        return f"two hosts need {', '.join(absent)}: apt-get install iproute2 pdsh openssh-server"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "ip", "link", "set", "lo", "up"], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"network namespaces are not permitted: {tried.stderr.strip()}"


@dataclass(frozen=True)
class HostHere:
    """A namespace that plays a host. variables: of each process that is started on it."""

    name: str
    address: str
    namespace: str
    variables: dict[str, str]

    def words(self, command: Sequence[Any]) -> list[str]:
        """A command as it is started from outside."""
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *map(str, command)]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def start(self, command: Sequence[Any], **more: Any) -> subprocess.Popen[str]:
        """A command in the background; its stdout and stderr are one pipe. more: environment variables."""
        env = {**os.environ, **self.variables, **{name: str(value) for name, value in more.items()}}
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(self.words(command), env=env, text=True, **output)

    def ip(self, *words: str) -> None:
        """An `ip` command, such as `link set eth0 down`."""
        _call("ip", "-n", self.namespace, *words)


@contextmanager
def two_hosts(
    folder: Path, *, slow: tuple[float, float] | None = None, **variables: str
) -> Iterator[tuple[HostHere, HostHere]]:
    """Two hosts that reach each other by name, and by ssh without a password.

    folder: for keys. slow: seconds that the cable takes, and bits a second that it carries each way (cable.py). variables:
    environment.
    """
    cable: subprocess.Popen[str] | None = None
    folder.mkdir(parents=True, exist_ok=True)
    _remove_left_behind()
    number = next(_numbers)
    spaces = [f"{name}-{os.getpid()}-{number}" for name in NAMES]
    hosts = [HostHere(*names, variables) for names in zip(NAMES, ADDRESSES, spaces, strict=True)]
    _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        for host in hosts:
            _call("ip", "netns", "add", host.namespace)
            _write_files(host, folder)
        if slow is None:
            ends = [("name", CABLE, "netns", space) for space in spaces]
            _call("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        else:
            words = [sys.executable, str(Path(__file__).with_name("cable.py")), *spaces, *map(str, slow)]
            cable = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            assert cable.stdout is not None
            assert cable.stdout.readline() == "ready\n"
            for space in spaces:
                # begins as Linux's cubic does after a rest, and bbr does not
                set_it = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"
                _call("ip", "netns", "exec", space, "sh", "-c", set_it)
        for host in hosts:
            host.ip("address", "add", f"{host.address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                host.ip("link", "set", link, "up")
            config = folder / f"sshd.{host.name}"
            subprocess.run(host.words([SSHD, "-f", config, "-E", folder / f"log.{host.name}"]), check=True, timeout=20)
        yield hosts[0], hosts[1]
    finally:
        if cable is not None:
            cable.kill()
            cable.wait()
        for space in spaces:
            _remove(space)


def _write_files(host: HostHere, folder: Path) -> None:
    """What a host has of its own: names, the ssh client's settings, the ssh server's."""
    own = Path("/etc/netns") / host.namespace
    shutil.copytree("/etc/ssh", own / "ssh")
    (own / "ssh" / "ssh_config").write_text(
        f"IdentityFile {folder}/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        "ServerAliveInterval 5\nServerAliveCountMax 3\n"  # as docs/many_ranks.md advises
    )
    names = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
    (own / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    set_env = "".join(f" {name}={value}" for name, value in host.variables.items())
    (folder / f"sshd.{host.name}").write_text(
        f"ListenAddress {host.address}\nHostKey {folder}/key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\nMaxStartups 100\n"
        f"ClientAliveInterval 5\nClientAliveCountMax 3\n{'SetEnv' + set_env if set_env else ''}\n"
    )


def _remove_left_behind() -> None:
    """The namespaces of tests that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    for space in (line.split()[0] for line in listed if line.startswith(NAMES)):
        if not Path("/proc", space.split("-")[2]).exists():
            _remove(space)


def _remove(space: str) -> None:
    """End the processes of a namespace, then the namespace and its files."""
    for _ in range(50):
        found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=20)
        if not found.stdout.split():
            break
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=20)
    shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"


if __name__ == "__main__":
    print("tests over two hosts:", missing() or "they run here")
