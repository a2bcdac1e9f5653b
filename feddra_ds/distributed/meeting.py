"""How the ranks of one run find each other, and nobody else: the store, who has come, and that all run the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from feddra_ds.common.errors import ConfigError, WaitTimeout, mark_told
from feddra_ds.common.logs import logger, say_problems
from feddra_ds.common.text import listed
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.messages import Messages

_SAY_WHO_IS_MISSING_S = 20.0
_HEAR_S = 20.0  # how long a rank that does not start stays until the others know why
_REACH_S = 120.0  # and how long it waits for a coordinator that has yet to come
_JOB = "the launcher's job"  # of what ranks compare
_RUN_FOLDER = "run.output_dir"  # of what ranks compare: two runs never share it
_LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Place:
    """Where a rank runs. free: bytes of memory that its host has left."""

    host: str
    pid: int
    device: str
    free: int = 0


def meet(
    launch: Launch, device: str, timeout_s: float, common: Mapping[str, Any] | None = None, interface: str | None = None
) -> tuple[dist.Store, list[Place]]:
    """The store of this run and the places of its ranks, in their order. Every rank calls it, and hears within timeout_s.

    Rank 0 names the run by a word of its own under which all keys lie, and each rank takes its place once. A rank whose
    `common` (what all must have in common, JSON values by name) differs from that of rank 0 leaves with ConfigError: it is
    of another job at the same port, or its host has another config; who waits for its own rank goes on waiting.
    interface: where rank 0 listens; None: everywhere, or on the loopback alone where the launcher says that all are there.

    Raises ConfigError; WaitTimeout where the port is taken, nobody serves it, or somebody does not come.
    """
    common = {**(common or {}), _JOB: launch.job}
    store = _store(launch, timedelta(seconds=timeout_s), interface)
    mine = Place(socket.gethostname(), os.getpid(), device, psutil.virtual_memory().available)
    if launch.rank == 0:
        return _receive(store, launch, mine, common, timeout_s)
    return _join(store, launch, mine, common, timeout_s)


def _receive(
    store: dist.Store, launch: Launch, mine: Place, common: dict[str, Any], timeout_s: float
) -> tuple[dist.Store, list[Place]]:
    """Rank 0's part: say what runs, wait until all have taken their places, say who is where."""
    word = secrets.token_hex(8)
    messages = Messages(store, 0, timeout_s)
    messages.post("coordinator", {"word": word, "place": asdict(mine), "common": common})
    places, began, is_said, is_warned = {0: mine}, time.monotonic(), False, False
    while missing := [rank for rank in range(launch.world_size) if rank not in places]:
        for rank in missing:
            if store.check([f"{word}/place/{rank}"]):
                places[rank] = Place(**json.loads(store.get(f"{word}/place/{rank}")))
        if store.check([f"{word}/refused"]):
            told = json.loads(store.get(f"{word}/refused"))
            error = ConfigError([f"on {told['host']} (rank {told['rank']}): {line}" for line in told["problems"]])
            say_problems(error)
            _refuse_all(messages, word, launch, error.problems)
            raise error
        if not is_warned and store.check([f"{word}/sent away"]):
            is_warned = True
            logger.warning("%s", json.loads(store.get(f"{word}/sent away")))
        waited, who = time.monotonic() - began, f"rank {listed([str(rank) for rank in missing])}"
        if waited >= timeout_s:
            raise WaitTimeout(
                f"rank 0 waited {waited:.0f} s for {who} of {launch.world_size} to join at {launch.address}:{launch.port}; "
                "was each host's command started? (clients.timeout_s bounds this wait)"
            )
        if not is_said and waited >= _SAY_WHO_IS_MISSING_S:
            is_said = True
            logger.info("waiting for %s of %d to join at %s:%d", who, launch.world_size, launch.address, launch.port)
        time.sleep(min(0.1, 0.001 + 0.02 * waited))
    in_order = [places[rank] for rank in range(launch.world_size)]
    messages.post(f"{word}/places", [asdict(place) for place in in_order])
    return dist.PrefixStore(word, store), in_order


def _join(
    store: dist.Store, launch: Launch, mine: Place, common: dict[str, Any], timeout_s: float
) -> tuple[dist.Store, list[Place]]:
    """The other ranks' part: hear what rank 0 runs, take the own place, hear who is where."""
    messages, coordinator = Messages(store, launch.rank, timeout_s), "the coordinator (rank 0)"
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        said = messages.fetch("coordinator", sender=coordinator, timeout_s=max(0.0, left))
        word = said["word"]
        _check_starts(store, launch, said)
        _check_same(store, launch, mine, common, said)
        mark = json.dumps(asdict(mine))
        found = store.compare_set(f"{word}/place/{launch.rank}", "", mark).decode()
        if found != mark and not launch.agent_serves:
            other = Place(**json.loads(found))
            raise ConfigError(
                [
                    f"rank {launch.rank} of this run has joined already, as process {other.pid} on {other.host}; was the command "
                    f"started twice? Another run needs another port than {launch.port} (deepspeed --master_port, MASTER_PORT)"
                ]
            )
        # An agent's store still has what a coordinator wrote before a restart: then wait for the word of the new one.
        while (said := _current(store))["word"] == word:
            _check_starts(store, launch, said)
            if found == mark and store.check([f"{word}/places"]):
                places = json.loads(store.get(f"{word}/places"))
                return dist.PrefixStore(word, store), [Place(**place) for place in places]
            if time.monotonic() >= deadline:
                raise WaitTimeout(
                    f"rank {launch.rank} waited {timeout_s:.0f} s for {coordinator}, which waits for other ranks at "
                    f"{launch.address}:{launch.port} (clients.timeout_s bounds this wait)"
                )
            time.sleep(0.05)


def refuse(launch: Launch, problems: Sequence[str]) -> bool:
    """Say that this rank cannot start, in place of `meet`. Returns whether rank 0 has heard of it, or cannot start itself.

    Rank 0 stays until the others have heard, at most 20 s. Another rank's problems end the run at rank 0, which says them.
    """
    with contextlib.suppress(WaitTimeout, dist.DistError):
        store = _store(launch, timedelta(seconds=_REACH_S))
        messages = Messages(store, launch.rank, _REACH_S)
        if launch.rank == 0:
            _refuse_all(messages, secrets.token_hex(8), launch, problems)
            return True
        said = messages.fetch("coordinator", sender="the coordinator (rank 0)")
        if said.get("common", {}).get(_JOB, launch.job) != launch.job:  # a coordinator of another job, at the same port
            return False
        _tell_refusal(store, launch, said, problems)
        return True
    return False


def _refuse_all(messages: Messages, word: str, launch: Launch, problems: Sequence[str]) -> None:
    """Rank 0's part: it waits until all others know, at most 20 s."""
    messages.post("coordinator", {"word": word, "problems": list(problems)})
    deadline = time.monotonic() + _HEAR_S
    with contextlib.suppress(WaitTimeout):
        for rank in range(1, launch.world_size):
            left = max(0.0, deadline - time.monotonic())
            messages.fetch(f"{word}/knows/{rank}", sender=f"rank {rank}", timeout_s=left)


def _tell_refusal(store: dist.Store, launch: Launch, said: dict[str, Any], problems: Sequence[str]) -> None:
    """Another rank's part: the first one's problems count. Raises WaitTimeout where rank 0 does not hear within 20 s."""
    word, deadline = said["word"], time.monotonic() + _HEAR_S
    told = {"host": socket.gethostname(), "rank": launch.rank, "problems": list(problems)}
    store.compare_set(f"{word}/refused", "", json.dumps(told))
    while "problems" not in said:
        if time.monotonic() >= deadline:
            raise WaitTimeout("the coordinator (rank 0) does not hear that this rank cannot start")
        time.sleep(0.05)
        said = _current(store)
    store.set(f"{word}/knows/{launch.rank}", "1")


def _check_starts(store: dist.Store, launch: Launch, said: dict[str, Any]) -> None:
    """Raises ConfigError where rank 0 does not start; it has said why."""
    if "problems" in said:
        store.set(f"{said['word']}/knows/{launch.rank}", "1")
        error = ConfigError(said["problems"])
        mark_told(error)
        raise error


def _current(store: dist.Store) -> dict[str, Any]:
    """What rank 0 has announced last."""
    try:
        return dict(json.loads(store.get("coordinator")))
    except dist.DistNetworkError:
        raise WaitTimeout("the coordinator (rank 0) ended while the ranks joined; its own lines say why") from None


def _check_same(store: dist.Store, launch: Launch, mine: Place, common: dict[str, Any], said: dict[str, Any]) -> None:
    """Raises ConfigError where the coordinator runs something else than this rank, and leaves a note for it: of the same
    run, that it cannot start; of another one, that it goes on without this rank."""
    ours, theirs = json.loads(json.dumps(common)), said["common"]
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if not names:
        return
    there = Place(**said["place"])
    if _RUN_FOLDER in ours and _RUN_FOLDER not in names:  # the same run: rank 0 would wait for this rank in vain
        lines = [
            f"{name} is {theirs.get(name)!r} on {there.host} (rank 0) and {ours.get(name)!r} here" for name in names
        ]
        error = ConfigError(
            [f"{line}; give all hosts one config, one dataset and one environment" for line in lines[:4]]
        )
        with contextlib.suppress(WaitTimeout, dist.DistError):
            _tell_refusal(store, launch, said, error.problems)
            mark_told(error)
        raise error
    different = listed([f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names], 4)
    with contextlib.suppress(dist.DistError):
        told = (
            f"process {mine.pid} on {mine.host} came as rank {launch.rank} of another run, and was sent away: "
            f"{', '.join(names[:4])} differ; waiting for this run's own rank {launch.rank}"
        )
        store.set(f"{said['word']}/sent away", json.dumps(told))
    raise ConfigError(
        [
            f"rank {launch.rank} found another run at {launch.address}:{launch.port} (process {there.pid} on {there.host}): "
            f"{different}; give all hosts one config, or this job another port (deepspeed --master_port, MASTER_PORT)"
        ]
    )


# --- the store ---------------------------------------------------------------------------------------------------------

_stores: dict[tuple[str, int], tuple[dist.TCPStore, Iterator[int]]] = {}  # by address and port


def _store(launch: Launch, timeout: timedelta, interface: str | None = None) -> dist.Store:
    """The store that rank 0 serves, or torchrun's agent, for one run.

    Under a launcher, whose port all runs of its processes share, the store lives as long as the process, and each run
    has a name of its own in it: a rank that is early in the next run must not read what the last one left.
    Raises WaitTimeout where the port is taken, or nobody serves it in time.
    """
    if launch.port == 0:  # the store takes a port that is free
        return _connect(launch, timeout, interface)
    place = launch.address, launch.port
    if place not in _stores:
        _stores[place] = _connect(launch, timeout, interface), itertools.count()
    store, runs = _stores[place]
    store.set_timeout(timeout)
    return dist.PrefixStore(f"run/{next(runs)}", store)


def _connect(launch: Launch, timeout: timedelta, interface: str | None) -> dist.TCPStore:
    place, is_served_here = f"{launch.address}:{launch.port}", launch.rank == 0 and not launch.agent_serves
    address, port, listener = launch.address, launch.port, None
    own = "127.0.0.1" if launch.address in _LOOPBACK else None if interface is None else address_of(interface)
    try:
        if is_served_here and own is not None:  # torch's store would listen on every interface
            with socket.create_server((own, port), backlog=2048) as server:
                address, port = own, server.getsockname()[1]
                listener = server.detach()
        return dist.TCPStore(
            address,
            port,
            launch.world_size,
            is_served_here,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    except (OSError, dist.DistError) as error:
        if is_served_here:
            todo = "is another job using it? choose another: deepspeed --master_port PORT, or MASTER_PORT"
            raise WaitTimeout(f"rank 0 cannot serve the run's store at {place}; {todo}") from error
        first = str(error).splitlines()[0]
        raise WaitTimeout(f"rank {launch.rank} cannot reach the coordinator (rank 0) at {place}: {first}") from None


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this host. Raises ConfigError, with those that there are."""
    found = psutil.net_if_addrs()
    addresses = [entry.address for entry in found.get(interface, []) if entry.family == socket.AF_INET]
    if not addresses:
        usable = [name for name, entries in found.items() if any(e.family == socket.AF_INET for e in entries)]
        what = "has no IPv4 address" if interface in found else "is no network interface"
        raise ConfigError(
            [f"topology.interface: {interface} {what} of {socket.gethostname()}; choose one of {listed(usable, 12)}"]
        )
    return str(addresses[0])
