"""What each launcher's environment says, what is refused, and the scripts in launch/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from feddra_ds.common.errors import ConfigError
from feddra_ds.distributed.launch import LAUNCHERS, Launch, first_host, missing_hostfile

SCRIPTS = Path(__file__).parents[3] / "launch"
MASTER = "MASTER_ADDR=head MASTER_PORT=29 "
SLURM = "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_JOB_ID=77 SLURM_STEP_ID=0 "
OMPI = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 "
PMI = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 "


def set_environment(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Nothing of any launcher but these `NAME=value` words."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "PMI", "MPI_", "TORCHELASTIC", "MASTER_", "ACCELERATE", "CROSS_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        name, _, value = word.partition("=")
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("words", "address", "job"),
    [
        (MASTER + "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1", "head", ""),
        (MASTER + "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 TORCHELASTIC_RUN_ID=a " + SLURM, "head", "a"),
        (SLURM + "SLURM_JOB_NODELIST=gpu[03-04]", "gpu03", "77/0"),
        (SLURM + "SLURM_LAUNCH_NODE_IPADDR=10.0.0.1", "10.0.0.1", "77/0"),
        (
            SLURM + "SLURM_JOB_NODELIST=gpu[03-04] SLURM_LAUNCH_NODE_IPADDR=10.0.0.1",
            "gpu03",
            "77/0",
        ),  # not the login node
        (SLURM + "SLURM_TASKS_PER_NODE=4 SLURM_JOB_NODELIST=gpu03", "127.0.0.1", "77/0"),
        (SLURM + "SLURM_STEP_NUM_TASKS=4 SLURM_TASKS_PER_NODE=2(x2) SLURM_JOB_NODELIST=a,b", "a", "77/0"),
        (SLURM + MASTER, "head", "77/0"),
        (OMPI + "OMPI_COMM_WORLD_LOCAL_SIZE=4", "127.0.0.1", ""),
        (OMPI + MASTER + "PMIX_NAMESPACE=9 PMIX_RANK=3", "head", "9"),
        # mpirun's helpers are tasks of SLURM with numbers of their own
        (OMPI + SLURM.replace("PROCID=3", "PROCID=0") + "SLURM_JOB_NODELIST=n[1-2]", "n1", ""),
        (PMI + "MPI_LOCALNRANKS=4", "127.0.0.1", ""),
        ("PMI_RANK=3 PMI_SIZE=4 SLURM_JOB_NODELIST=n[1-2] " + SLURM, "n1", "77/0"),  # srun --mpi=pmi2
        ("PMIX_RANK=3 SLURM_JOB_NODELIST=n[1-2] " + SLURM, "n1", "77/0"),  # srun --mpi=pmix
    ],
)
def test_each_launcher_starts_one_run(monkeypatch: pytest.MonkeyPatch, words: str, address: str, job: str) -> None:
    set_environment(monkeypatch, words)
    found = Launch.from_environment()
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert (found.address, found.job) == (address, job)
    assert found.port == 29 if "MASTER_PORT" in words else 1024 < found.port < 32768
    assert found == Launch.from_environment(), "ranks must reckon the same port"


def test_two_jobs_of_slurm_have_two_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job in range(77, 87):
        set_environment(monkeypatch, SLURM.replace("77", str(job)) + "SLURM_JOB_NODELIST=a")
        ports.add(Launch.from_environment().port)
    assert len(ports) == 10


@pytest.mark.parametrize(
    "words",
    [
        "",
        "SLURM_NTASKS=4 SLURM_JOB_NODELIST=a,b",  # a shell of salloc
        "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0",  # a batch script for one process
        "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=4294967290",  # salloc's interactive step
        "PMI_RANK=0 PMI_SIZE=1",
        "MASTER_PORT=29 LOCAL_RANK=0",
    ],
)
def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    set_environment(monkeypatch, words)
    assert Launch.from_environment() == Launch(0, 1, 0, "127.0.0.1", 0, is_launched=False)


@pytest.mark.parametrize(
    "words",
    [
        "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_JOB_NODELIST=a",  # a batch script, behind its srun
        "WORLD_SIZE=2 " + MASTER,
        "ACCELERATE_MIXED_PRECISION=no MASTER_PORT=29500",
    ],
)
def test_who_may_be_alone_is_alone_where_no_launcher_started_it(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    set_environment(monkeypatch, words)
    assert Launch.from_environment(may_be_alone=True) == Launch(0, 1, 0, "127.0.0.1", 0, is_launched=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("RANK=1 " + MASTER, r"RANK=1 is set .*torchrun.*, but not WORLD_SIZE"),
        ("RANK=1 WORLD_SIZE=2 " + MASTER, "but not LOCAL_RANK"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_PORT=1", "but MASTER_ADDR, the host of rank 0, is not"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=h", "MASTER_PORT"),
        ("RANK=x WORLD_SIZE=2 LOCAL_RANK=1 " + MASTER, "RANK=x is no number"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=1 " + MASTER, "RANK=2: there is no such rank among 2"),
        ("WORLD_SIZE=2 " + MASTER, "WORLD_SIZE=2 is set, but RANK is not"),
        ("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_JOB_NODELIST=a", r"SLURM_NTASKS=4, but srun did not"),
        ("SLURM_PROCID=1 SLURM_STEP_ID=0", "SLURM_PROCID=1 is set .* but not SLURM_STEP_NUM_TASKS or SLURM_NTASKS"),
        (OMPI, r"OMPI_COMM_WORLD_RANK=3 is set \(Open MPI\), but MASTER_ADDR.*mpirun -x MASTER_ADDR=HOST"),
        ("PMIX_RANK=1", r"PMIX_RANK=1 is set \(PMIx\), but not PMIX_SIZE.*RANK, WORLD_SIZE, LOCAL_RANK"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 " + MASTER + SLURM, "RANK and WORLD_SIZE=1 say .* SLURM_PROCID .*one of 4"),
        ("ACCELERATE_MIXED_PRECISION=no MASTER_PORT=29500", "accelerate launch .*--multi_gpu"),
    ],
)
def test_what_is_incomplete_or_contradicts_itself_is_named(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    set_environment(monkeypatch, words)
    with pytest.raises(ConfigError, match=told) as error:
        Launch.from_environment()
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


def test_torchruns_agent_serves_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, MASTER + "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 TORCHELASTIC_USE_AGENT_STORE=True")
    assert Launch.from_environment().agent_serves
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not Launch.from_environment().agent_serves


def test_every_launcher_has_a_row_of_its_own() -> None:
    assert len({names.rank for names in LAUNCHERS}) == len(LAUNCHERS) == 5


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,9],login", "gpu03"), ("r[1,3]n[07-08]", "r1n07"), ("n[12]", "n12")],
)
def test_the_first_host_of_slurms_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("command", "lost"),
    [
        (["python", "/bin/deepspeed", "--hostfile", "typo", "train.py"], "typo"),
        (["python", "/bin/deepspeed", "-H", "typo", "train.py"], "typo"),
        (["python", "-m", "deepspeed.launcher.runner", "--hostfile=typo", "train.py"], "typo"),
        (["python", "/bin/deepspeed", "--hostfile", "hosts", "train.py"], None),
        (["python", "/bin/deepspeed", "train.py"], None),
        (["bash", "start.sh", "--hostfile", "typo"], None),
    ],
)
def test_a_hostfile_that_is_not_there_is_found_in_the_launchers_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], lost: str | None
) -> None:
    class Parent:
        def cmdline(self) -> list[str]:
            return command

        def cwd(self) -> str:
            return str(tmp_path)

    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.setattr(psutil.Process, "parents", lambda _: [Parent()])
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    assert missing_hostfile() is None
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert missing_hostfile() == lost


@pytest.mark.parametrize("name", ["slurm.sbatch", "two_hosts.sh"])
def test_the_scripts_parse_and_explain_themselves(name: str) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True, timeout=20)
    for arguments in (["--help"], []):
        done = subprocess.run(["bash", SCRIPTS / name, *arguments], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        assert name in done.stdout.splitlines()[0]
        assert "--config FILE" in done.stdout


def test_a_job_that_was_asked_to_end_is_queued_again(tmp_path: Path) -> None:
    for name, ends in (("srun", "exit 75"), ("scontrol", f'echo "$@" > {tmp_path}/said')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{ends}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", SCRIPTS / "slurm.sbatch", "--config", "c.yaml"], timeout=20, env=environment)
    assert done.returncode == 75
    assert (tmp_path / "said").read_text() == "requeue 17\n"


def test_srun_and_ssh_get_the_arguments_as_they_were(tmp_path: Path) -> None:
    """Both programs are replaced by ones that write down what they get, each process in a file of its own."""
    for name in ("srun", "ssh"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s|" "$@" > {tmp_path}/{name}.said.$$\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "RANKS": "4"}
    words = ["--config", "my config.yaml", "--clients.ids", "[a, b]"]
    subprocess.run(["bash", SCRIPTS / "slurm.sbatch", *words], check=True, timeout=20, env=environment)
    (said,) = (path.read_text() for path in tmp_path.glob("srun.said.*"))
    assert said.endswith("|python|-m|feddra_ds|train|--config|my config.yaml|--clients.ids|[a, b]|")
    subprocess.run(["bash", SCRIPTS / "two_hosts.sh", "one", "two", *words], check=True, timeout=20, env=environment)
    lines = sorted(path.read_text().replace("\\\n", "") for path in tmp_path.glob("ssh.said.*"))
    assert len(lines) == 2
    for node, (host, line) in enumerate(zip(("one", "two"), lines, strict=True)):
        assert f"|{host}|cd " in line
        assert f"--node_rank {node} --nproc_per_node 4 --master_addr one" in line
        assert r"--config my\ config.yaml --clients.ids \[a\,\ b\]|" in line
