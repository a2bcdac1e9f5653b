"""Real processes: a rank under a launcher that is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

RANK = (
    "from feddra_ds.distributed.launcher_watch import end_with_launcher as e; import time; e(); print('up', flush=True)"
)
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {RANK}; time.sleep(60)"
HEARS = f"{RANK}; time.sleep(60)"


def start_chain(*links: list[str]) -> subprocess.Popen[str]:
    """A process for each link, each started by the one before, whose arguments come behind the code that starts the next."""
    command = [sys.executable, "-c", *links[-1]]
    for link in reversed(links[:-1]):
        command = [sys.executable, "-c", f"import subprocess; subprocess.Popen({command!r}).wait()", *link]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def chain(*links: list[str]) -> Iterator[list[psutil.Process]]:
    """The processes of a chain, the first the outermost launcher, once the rank watches."""
    first = start_chain(*links)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "up\n"
        processes = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        assert len(processes) == len(links)
        yield processes
    finally:
        for process in [first, *locals().get("processes", [])]:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        first.wait()


def has_ended(process: psutil.Process, within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def test_a_rank_ends_with_its_launcher() -> None:
    with chain([], [HEARS]) as (launcher, rank):
        launcher.kill()
        assert has_ended(rank)


def test_a_rank_ends_with_the_deepspeed_command_above_its_helper() -> None:
    with chain(["deepspeed"], ["deepspeed.launcher.launch"], [HEARS]) as (command, _, rank):
        command.kill()
        assert has_ended(rank)


def test_a_shell_that_ends_above_a_helper_ends_no_rank() -> None:
    """`deepspeed.launcher.launch` may be started in the background, by a shell that goes."""
    with chain(["a-shell"], ["deepspeed.launcher.launch"], [HEARS]) as (shell, _, rank):
        shell.kill()
        assert not has_ended(rank, 3)


def test_a_rank_that_hears_no_signal_is_ended() -> None:
    short = "import feddra_ds.distributed.launcher_watch as w; w._GRACE_S = 1; "
    with chain([], [short + DEAF]) as (launcher, rank):
        launcher.kill()
        assert has_ended(rank)


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal closed", "nohup"])
def test_sighup_stops_a_run_unless_it_is_ignored(ignored: bool) -> None:
    from feddra_ds.common.errors import Interrupted
    from feddra_ds.run.train import _signals_end_the_run

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with _signals_end_the_run(), contextlib.nullcontext() if ignored else pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
