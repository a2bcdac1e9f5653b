"""What the launcher's environment says of this process, and which device it takes."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from feddra_ds.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

_DEFAULT_PORT = 29500  # of every launcher
_PORTS = range(15000, 30000)  # below those that the kernel gives to outgoing connections


@dataclass(frozen=True)
class Variables:
    """The names under which a launcher tells a process its place; of several, the first that is set counts.

    on_host: how many ranks there are on this host. job: what the ranks of one job, and no others, have in common.
    """

    launcher: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    on_host: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


# The first whose `rank` is set counts: mpirun under SLURM leaves SLURM's own in place, which number its helpers.
LAUNCHERS = (
    Variables(
        "deepspeed, torchrun or accelerate", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), job=("TORCHELASTIC_RUN_ID",)
    ),
    Variables(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE",),
    ),
    Variables(
        "MPICH or Intel MPI",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        ("PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    Variables(
        "SLURM",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    Variables("PMIx", "PMIX_RANK", ("PMIX_SIZE",), ("PMIX_LOCAL_RANK",), ("PMIX_LOCAL_SIZE",), ("PMIX_NAMESPACE",)),
)
_TORCH, *_OTHERS = LAUNCHERS
_SRUN_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_LAUNCH_NODE_IPADDR")  # srun sets them, sbatch does not
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
_BY_HAND = "or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process.

    job: what only the ranks of this launch know, "" where the launcher gives nothing. agent_serves: torchrun's agent
    serves the store at address:port, through all its restarts; else rank 0 does. is_launched: False for a
    process that is a world of its own.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    job: str = ""
    agent_serves: bool = False
    is_launched: bool = True

    @staticmethod
    def from_environment(*, may_be_alone: bool = False) -> Launch:
        """This process's place, as the first of LAUNCHERS says that is there, or a world of one where none is.

        may_be_alone: so too in a job of several processes of which no launcher has started this one, as in a batch script
        after its srun; that is a mistake in training.

        Raises ConfigError, a line that names the variables, where they contradict each other or some are missing.
        """
        env = os.environ
        names = next((names for names in LAUNCHERS if names.rank in env), None)
        if names is None:
            if not may_be_alone:
                _check_alone(env)
            return Launch(0, 1, 0, "127.0.0.1", 0, is_launched=False)  # the store takes a port that is free
        rank, world_size = _number(env, (names.rank,), names), _number(env, names.world_size, names)
        if not 0 <= rank < world_size:
            raise ConfigError([f"{names.rank}={rank}: there is no such rank among {world_size} ({names.launcher})"])
        if names.launcher == "SLURM" and world_size > 1 and not any(name in env for name in _SRUN_STEP):
            if may_be_alone:
                return Launch(0, 1, 0, "127.0.0.1", 0, is_launched=False)
            raise ConfigError(
                [
                    f"SLURM_NTASKS={world_size}, but srun did not start this process (no SLURM_STEP_ID), so it would train "
                    "alone; put srun before the command, or unset SLURM_NTASKS to train with one process"
                ]
            )
        if names is _TORCH and world_size == 1:
            _check_not_one_of_many(env)
        if names is not _TORCH and world_size == 1:
            return Launch(0, 1, 0, "127.0.0.1", 0, is_launched=False)
        job = "/".join(env[name] for name in names.job if name in env)
        return Launch(
            rank,
            world_size,
            _number(env, names.local_rank, names),
            _address(env, names, world_size),
            _port(env, names, job),
            job,
            env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def _number(env: Mapping[str, str], names: tuple[str, ...], launcher: Variables) -> int:
    """The number under the first of these names that is set. Raises ConfigError."""
    name = next((name for name in names if name in env), None)
    if name is None:
        said = f"{launcher.rank}={env[launcher.rank]} is set ({launcher.launcher}), but not {' or '.join(names)}"
        raise ConfigError([f"{said}: start with torchrun, deepspeed or srun, {_BY_HAND}"])
    if not env[name].strip().isdigit():
        raise ConfigError([f"{name}={env[name]} is no number ({launcher.launcher})"])
    return int(env[name])


def _address(env: Mapping[str, str], names: Variables, world_size: int) -> str:
    """Where rank 0 is. Raises ConfigError where nothing says it."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if names is not _TORCH:
        if any(env.get(name) == str(world_size) for name in names.on_host):
            return "127.0.0.1"
        if nodes := next((env[name] for name in _NODES if name in env), None):
            return first_host(nodes)
        if "SLURM_LAUNCH_NODE_IPADDR" in env:
            return env["SLURM_LAUNCH_NODE_IPADDR"]
    said = f"{names.rank}={env[names.rank]} is set ({names.launcher}), but MASTER_ADDR, the host of rank 0, is not"
    todo = "mpirun -x MASTER_ADDR=HOST (Open MPI), mpirun -genv MASTER_ADDR HOST (MPICH, Intel MPI)"
    raise ConfigError([said + (f": {todo}" if names is not _TORCH else "")])


def _port(env: Mapping[str, str], names: Variables, job: str) -> int:
    if "MASTER_PORT" in env:
        return _number(env, ("MASTER_PORT",), names)
    if names is _TORCH:
        raise ConfigError([f"RANK={env['RANK']} is set, but MASTER_PORT, the port of rank 0's store, is not"])
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)] if job else _DEFAULT_PORT


def first_host(nodes: str) -> str:
    """The first of a list of hosts as SLURM writes it: `gpu[03-05,9],login` → gpu03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def _check_alone(env: Mapping[str, str]) -> None:
    """Raises ConfigError where a launcher has meant to start several processes, and each would train alone."""
    if env.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            [
                f"WORLD_SIZE={env['WORLD_SIZE']} is set, but RANK is not: this process would train alone; set it, or unset both"
            ]
        )
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        raise ConfigError(
            [
                "accelerate launch has set MASTER_PORT, but not RANK: on CPUs it starts one process, whatever --num_processes "
                "says; use torchrun --nproc_per_node N, or accelerate launch --multi_gpu"
            ]
        )


def _check_not_one_of_many(env: Mapping[str, str]) -> None:
    """Raises ConfigError where WORLD_SIZE=1 was left in the environment of processes that another launcher started."""
    if "TORCHELASTIC_RUN_ID" in env or "CROSS_SIZE" in env:  # torchrun or deepspeed, started by that launcher
        return
    for names in _OTHERS:
        size = next((env[name] for name in names.world_size if name in env), "1")
        is_started = names.launcher != "SLURM" or any(name in env for name in _SRUN_STEP)
        if names.rank in env and is_started and size != "1":
            raise ConfigError(
                [
                    f"RANK and WORLD_SIZE=1 say that this process trains alone, {names.rank} and {names.world_size[0]} that it "
                    f"is one of {size} ({names.launcher}); unset RANK and WORLD_SIZE"
                ]
            )


def is_deepspeed(command: Sequence[str]) -> bool:
    """Whether a process's words are the `deepspeed` command, not one of its helpers."""
    return any(Path(word).name in ("deepspeed", "deepspeed.launcher.runner") for word in command)


def missing_hostfile() -> str | None:
    """The --hostfile of the deepspeed command above this process, where there is no such file: it then takes this host
    alone, with a warning among many lines."""
    if "CROSS_SIZE" not in os.environ:  # set by deepspeed
        return None
    for parent in psutil.Process().parents():
        try:
            words, folder = parent.cmdline(), parent.cwd()
        except psutil.Error:
            continue
        if not is_deepspeed(words):
            continue
        for word, following in zip(words, [*words[1:], ""], strict=True):
            name, _, value = word.partition("=")
            if name in ("-H", "--hostfile"):
                wanted = value or following
                return None if (Path(folder) / wanted).is_file() else wanted
    return None


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank for run.device; raises ValueError where CUDA is asked for and absent."""
    import torch  # on demand: reading the environment should cost nothing

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
