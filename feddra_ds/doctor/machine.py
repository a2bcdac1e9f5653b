"""What `feddra-ds doctor` looks at on a machine: software, hardware, network, disk, and two ranks that meet."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from feddra_ds.common.text import size
from feddra_ds.doctor import selftest
from feddra_ds.doctor.finding import Finding
from feddra_ds.engine.build_locks import stale_locks

LAUNCHER_PORT = 29500  # of the deepspeed launcher, unless --master_port says otherwise
_FEW_FILES = 1024
_LITTLE_DISK = 2_000_000_000


def check_software() -> Iterator[Finding]:
    """Python, the packages that pyproject.toml asks for, and the versions that the tests ran with."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    tested = _tested_versions()
    good = []
    for text in metadata.requires("feddra-ds") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("problem", name, "is not installed", f"pip install '{text}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding("problem", name, f"{version}, but {requirement.specifier} is needed", f"pip install '{text}'")
        elif name in tested and version.partition("+")[0] != tested[name]:
            yield Finding(
                "note", name, f"{version}; the tests ran with {tested[name]}", "pip install -c constraints.txt -e ."
            )
        else:
            good.append(f"{name} {version}")
    yield Finding("ok", "packages", ", ".join(good))
    missing = [tool for tool in ("c++", "ninja") if _tool(tool) is None]
    if missing:
        todo = "apt-get install g++ (or your system's compiler), pip install ninja"
        yield Finding(
            "warning", "compiler", f"{' and '.join(missing)} not found; DeepSpeed builds its CPU parts with them", todo
        )
    else:
        yield Finding("ok", "compiler", f"{_tool('c++')}, {_tool('ninja')}")
    for lock in stale_locks():
        found = f"{lock} was left by a build that was killed; the next one would wait for it for ever"
        yield Finding("warning", "compiler", found, f"rm {lock}")


def check_hardware() -> Iterator[Finding]:
    """GPUs as torch sees them, Triton beside them, memory, open files."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            yield Finding("ok", f"gpu {index}", f"{about.name}, {size(about.total_memory)}, CUDA {torch.version.cuda}")
        try:
            yield Finding("ok", "triton", metadata.version("triton"))
        except metadata.PackageNotFoundError:
            todo = "pip install 'feddra-ds[gpu]'; without it the chunked loss runs"
            yield Finding("warning", "triton", "is not installed, so the fused loss kernels cannot run", todo)
    elif shutil.which("nvidia-smi"):
        todo = "install a CUDA build of torch (https://pytorch.org), or check the driver with nvidia-smi"
        yield Finding("warning", "gpu", f"there is one, but torch {torch.__version__} cannot use it", todo)
    else:
        yield Finding("ok", "gpu", f"none; training runs on {os.cpu_count()} CPU cores")
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{size(memory.available)} free of {size(memory.total)}")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _FEW_FILES:
        yield Finding("warning", "open files", f"{files} at most", "ulimit -n 4096")


def check_network() -> Iterator[Finding]:
    """The launcher's port, and the interface that gloo and NCCL will take between hosts."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", LAUNCHER_PORT))
            yield Finding("ok", "port", f"{LAUNCHER_PORT} is free")
        except OSError:
            todo = "deepspeed --master_port with another one"
            yield Finding("warning", "port", f"{LAUNCHER_PORT}, the deepspeed launcher's own, is taken", todo)
    up = [name for name, about in psutil.net_if_stats().items() if about.isup]
    outward = [name for name in up if not name.startswith("lo")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable)
        if wanted and wanted not in up and not wanted.startswith(("^", "=")):
            yield Finding(
                "problem",
                variable,
                f"{wanted} is no interface that is up",
                f"choose one of {', '.join(up)}, or unset it",
            )
    if os.environ.get("GLOO_SOCKET_IFNAME") or len(outward) == 0:
        yield Finding("ok", "network", f"interfaces: {', '.join(up)}")
    elif _resolves_to_loopback():
        todo = f"for several hosts only: put GLOO_SOCKET_IFNAME={outward[0]} into .deepspeed_env on the first host"
        yield Finding(
            "note", "network", f"this host's name means the loopback, which gloo would take; up: {', '.join(up)}", todo
        )
    else:
        yield Finding("ok", "network", f"interfaces: {', '.join(up)}; the host's name means one of them")


def check_deepspeed(timeout_s: float) -> Iterator[Finding]:
    """Import DeepSpeed in a process of its own."""
    code = "import deepspeed; from deepspeed.accelerator import get_accelerator as g; print(g()._name)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        yield Finding(
            "problem", "deepspeed", f"its import did not end within {timeout_s:.0f} s", "look for a hanging file system"
        )
        return
    if done.returncode == 0:
        yield Finding("ok", "deepspeed", f"imports; its accelerator is {done.stdout.strip().splitlines()[-1]}")
    else:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("problem", "deepspeed", f"cannot be imported: {last}", "pip install -c constraints.txt -e .")


def check_gloo(timeout_s: float) -> Iterator[Finding]:
    """Two ranks on this host meet as those of a run do."""
    outcome = selftest.run(timeout_s)
    if outcome.problem is None:
        yield Finding("ok", "gloo", f"two ranks met and added up in {outcome.seconds:.0f} s")
    else:
        todo = "check GLOO_SOCKET_IFNAME and that localhost can be reached; a longer bound: --timeout"
        yield Finding("problem", "gloo", f"two ranks on this host did not meet: {outcome.problem}", todo)


def check_disk(folder: Path, needed: int | None) -> Iterator[Finding]:
    """Room and permission where the run writes. needed: bytes of its checkpoints, or None where that is not known."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding(
            "problem",
            "disk",
            f"{folder} cannot be written: {place} is no writable folder",
            "choose another run.output_dir",
        )
        return
    free = shutil.disk_usage(place).free
    wanted = "" if needed is None else f"; checkpoints and model need about {size(needed)}"
    if free < (needed or _LITTLE_DISK):
        todo = "choose another run.output_dir, or lower checkpoint.keep"
        yield Finding("problem" if needed else "warning", "disk", f"{size(free)} free for {folder}{wanted}", todo)
    else:
        yield Finding("ok", "disk", f"{size(free)} free for {folder}{wanted}")


def _tested_versions() -> dict[str, str]:
    """constraints.txt beside the package, where this is a checkout."""
    path = Path(__file__).parents[2] / "constraints.txt"
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        out[requirement.name] = str(requirement.specifier).removeprefix("==")
    return out


def _tool(name: str) -> str | None:
    """A program on the path or beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _resolves_to_loopback() -> bool:
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return True
