"""A rank whose launcher is gone ends itself, so that no rank trains on as an orphan."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

from feddra_ds.common.logs import logger
from feddra_ds.distributed.launch import is_deepspeed

_EVERY_S = 1.0
_GRACE_S = 30.0  # as deepspeed and torchrun grant a rank between SIGTERM and SIGKILL


def end_with_launcher() -> None:
    """Watch the launcher from a thread. Once it is gone, this process gets SIGTERM, and is ended 30 s later if that has not.

    Watched are the parent and, where that is one of deepspeed's own helpers, the `deepspeed` command above it: a killed
    command leaves its helpers running.
    """
    parent = os.getppid()
    links = {os.getpid(): parent}
    above = _parent_of(parent)
    if above is not None and "deepspeed.launcher.launch" in _command(parent) and is_deepspeed(_command(above)):
        links[parent] = above
    threading.Thread(target=_watch, args=(links,), daemon=True, name="launcher watch").start()


def _watch(links: dict[int, int]) -> None:
    while all(_parent_of(child) == parent for child, parent in links.items()):
        time.sleep(_EVERY_S)
    logger.warning("the launcher is gone, so this rank ends; started again, the run goes on from its last checkpoint")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)  # a rank that waits in a collective does not hear signals
    os._exit(128 + signal.SIGTERM)


def _parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def _command(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []
