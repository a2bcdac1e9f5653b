"""What `feddra-ds doctor --hostfile` runs on each host, sent there over ssh: it needs a Python and nothing else.

`look JSON` prints one JSON object of what a training would find there; `listen PORT NUM` takes what NUM others send, one
after another; `send ADDRESS PORT` measures the way there: seconds of a round trip, bytes a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers", "feddra-ds")
_PINGS, _STREAM_S, _PATIENCE_S = 5, 2.0, 60.0


def look(config: str | None, data: str | None, out: str, port: int, **_: object) -> dict[str, object]:
    """What is here of a run: versions, digests of what must be equal, room, addresses."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    return {
        "time": time.time(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "digests": {"code": _of_code(), "config": _of_file(config), "data": _of_data(data)},
        "free": shutil.disk_usage(place).free,
        "is_writable": place.is_dir() and os.access(place, os.W_OK | os.X_OK),
        "is_port_free": _is_free(port),
        "interfaces": _interfaces(),
        "own_address": _own_address(),
    }


def listen(port: int, num: int) -> None:
    """Echo what each sender sends first, then count. Ends after 60 s without one."""
    with socket.create_server(("", port)) as server:
        server.settimeout(_PATIENCE_S)
        print("ready", flush=True)
        for _ in range(num):
            link, _address = server.accept()
            with link:
                link.settimeout(_PATIENCE_S)
                for _ping in range(_PINGS):
                    link.sendall(link.recv(1))
                link.sendall(json.dumps(_receive(link)).encode())


def _receive(link: socket.socket) -> float:
    """Bytes a second of the second half of what comes, in which TCP has found its pace."""
    began, count, arrived = time.monotonic(), 0, []
    while part := link.recv(1 << 20):
        count += len(part)
        arrived.append((time.monotonic(), count))
    ended = arrived[-1][0]
    half = next(index for index, (when, _) in enumerate(arrived) if when >= (began + ended) / 2)
    return (count - arrived[half][1]) / max(ended - arrived[half][0], 1e-6)


def send(address: str, port: int) -> dict[str, float]:
    """Measure: the shortest of some round trips, and what goes there in a second, at TCP's pace."""
    with socket.create_connection((address, port), timeout=20.0) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(_PINGS):
            began = time.monotonic()
            link.sendall(b"x")
            link.recv(1)
            trips.append(time.monotonic() - began)
        block, until = bytes(1 << 18), time.monotonic() + _STREAM_S
        while time.monotonic() < until:
            link.sendall(block)
        link.shutdown(socket.SHUT_WR)
        link.settimeout(_PATIENCE_S)
        told = json.loads(link.makefile("rb").read())
    return {"round_trip_s": min(trips), "bytes_per_s": told}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _of_code() -> str | None:
    """Of the sources of feddra_ds that would be imported here, which a checkout may have changed."""
    spec = importlib.util.find_spec("feddra_ds")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    return _of([(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.py"))])


def _of_file(path: str | None) -> str | None:
    return _of([("", Path(path).read_bytes())]) if path is not None and Path(path).is_file() else None


def _of_data(root: str | None) -> str | None:
    """Of what describes a dataset: dataset.json and each client's index.json. None without a folder."""
    if root is None or not Path(root).is_dir():
        return None
    found = [path for path in (Path(root) / "dataset.json", *sorted(Path(root).glob("*/index.json"))) if path.is_file()]
    return _of([(str(path.relative_to(root)), path.read_bytes()) for path in found])


def _of(parts: list[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _interfaces() -> dict[str, str]:
    """IPv4 addresses by interface, of Linux."""
    import fcntl
    import struct

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _own_address() -> str | None:
    """What this host's own name means here."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "look":
        print(json.dumps(look(**json.loads(words[1]))))
    elif words[0] == "listen":
        listen(int(words[1]), int(words[2]))
    else:
        print(json.dumps(send(words[1], int(words[2]))))
