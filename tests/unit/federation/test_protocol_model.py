"""A run's agreement under a model checker: nobody waits without bound, no stale update is averaged, what is committed is one.

The real Run.rounds, Coordinator, Protocol, Topology and CheckpointWriter of every rank, in one process, over a store and a
clock of their own (protocol_world.py). Training is a pause, an update a tuple that says where it comes from, a collective a
meeting of the peers that fails as gloo's does. A schedule is drawn by its seed: messages late, lost or told twice; ranks slow,
killed, stopped past every time-out and continued; the whole job killed and started again from its newest checkpoint.

FEDDRA_MODEL_SCHEDULES sets how many (`make model-check`: 100,000). A schedule that failed is repeated by its number:
FEDDRA_MODEL_FIRST=NUMBER FEDDRA_MODEL_SCHEDULES=1.
"""

from __future__ import annotations

import logging
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from protocol_world import Faults, Process, Store, Violation, World, in_its_own_time

from feddra_ds import strategies
from feddra_ds.common.errors import CheckpointNotWritten, TooFewClients, WaitTimeout
from feddra_ds.common.logs import logger
from feddra_ds.config.load import from_dict
from feddra_ds.data.loading.order import Position
from feddra_ds.distributed import messages
from feddra_ds.distributed.messages import Messages
from feddra_ds.distributed.plan import plan
from feddra_ds.distributed.topology import Topology
from feddra_ds.federation import protocol as protocol_module
from feddra_ds.federation.aggregation.held import Judgement
from feddra_ds.federation.client import LocalResult
from feddra_ds.federation.coordinator import Coordinator
from feddra_ds.federation.protocol import Decision, Loss, RankReport
from feddra_ds.run import checkpoint_writer, rounds
from feddra_ds.run.rounds import Run
from feddra_ds.strategies import robust_weights

SCHEDULES = int(os.environ.get("FEDDRA_MODEL_SCHEDULES", "150"))
FIRST = int(os.environ.get("FEDDRA_MODEL_FIRST", "0"))
TIMEOUT = 10.0  # clients.timeout_s
ROUNDS = 2
# each of a round's waits may last PATIENCE times the time-out, and a job may be started again twice
LIMIT = 60 * ROUNDS * TIMEOUT
LAYOUTS = ((2, 1), (3, 1), (2, 1), (3, 1), (4, 2))  # ranks, ranks a slot
CONFIG = from_dict(
    {
        "data": {"root": "x"},
        "run": {"output_dir": "model-check"},
        "clients": {"timeout_s": TIMEOUT},
        "schedule": {"rounds": ROUNDS, "stage1_steps": 1, "stage2_steps": 1},
        "evaluation": {"every": 0},
        "strategy": {"name": "feddra"},
    }
)
STRATEGY = strategies.build(CONFIG.strategy, CONFIG.dro)
CENTER = np.full(3, 1 / 3)


# ---- a job: all ranks of one start
@dataclass
class Job:
    """What its ranks share: a store, the peers' groups, and what each has committed."""

    world: World
    layout: Any
    faults: Faults
    is_slow: bool  # whether training may take longer than the time-out
    disk: dict[int, dict[str, Any]]  # checkpoints by round, of all starts
    bad: set[tuple[int, int, str]]  # the client, round and stage of updates that cannot be averaged
    processes: list[Process] = field(default_factory=list)
    values: dict[str, bytes] = field(default_factory=dict)
    groups: dict[tuple[int, int], Group] = field(default_factory=dict)
    committed: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # by round: the model and p

    def start(self) -> None:
        self.processes = [Process(f"rank {rank}") for rank in range(self.layout.world_size)]
        for rank, process in enumerate(self.processes):
            self.world.start(process, lambda rank=rank, process=process: self._rank(rank, process), is_main=True)

    def _rank(self, rank: int, process: Process) -> None:
        run = CheckedRun.of(self, rank, process)
        run.rounds()
        run.topology.close()

    def kill(self) -> None:
        """All of it, as a machine that goes down."""
        for process in self.processes:
            self.world.kill(process)

    def found(self, problem: str) -> None:
        self.world.violations.append(problem)


class Group:
    """The peers of a generation: the k-th meeting of one is the k-th of all, whatever they bring, as in a collective."""

    def __init__(self, job: Job, slots: tuple[int, ...], name: str):
        self.job, self.slots, self.name, self.is_broken = job, slots, name, False
        self.met = dict.fromkeys(slots, 0)
        self.brought: dict[int, dict[int, list[Any]]] = {}

    def meet(self, slot: int, updates: list[Any], process_of: Mapping[int, Process]) -> list[Any]:
        world, index = self.job.world, self.met[slot]
        self.met[slot] += 1
        key, deadline = f"{self.name} meeting {index}", world.now + TIMEOUT
        if self.is_broken:
            raise RuntimeError("[gloo] Connection closed by peer")
        here = self.brought.setdefault(index, {})
        here[slot] = updates
        world.tell(key)
        while len(here) < len(self.slots):
            gone = [s for s in self.slots if s not in here and process_of[s].is_dead]
            if self.is_broken or gone or world.now >= deadline:
                self.is_broken = True
                world.tell(key)
                raise RuntimeError("[gloo] Connection closed by peer" if gone else "[gloo] Timed out waiting")
            world.wait(TIMEOUT / 2, key)
        return [update for s in self.slots for update in here[s]]


class CheckedTopology(Topology):
    """A place in a job, over the world's store."""

    def __init__(self, job: Job, rank: int):
        self.job, self.plan = job, job.layout
        self.slot, self.slot_rank = self.plan.slot_of(rank), self.plan.slot_rank_of(rank)
        self.device, self.places = torch.device("cpu"), []
        store: Any = Store(job.world, job.values, job.processes[0], job.faults)
        Messages.__init__(self, store, rank, TIMEOUT)
        self.live_slots = tuple(range(self.plan.num_slots))
        self.peers = self._join_peers(0)

    def _join_peers(self, generation: int) -> Any:
        if len(self.live_slots) == 1:
            return None
        name = f"peers of slot rank {self.slot_rank}, generation {generation}"
        place = generation, self.slot_rank
        group = self.job.groups.setdefault(place, Group(self.job, self.live_slots, name))
        if group.slots != self.live_slots:
            self.job.found(f"slot {self.slot} joins the {name} with {self.live_slots}, others with {group.slots}")
        return group


class CheckedServer:
    """Averages are lists of updates, and a model is a number that stands for all that went into it."""

    num_bytes, snapshot = 0, None

    def __init__(self, run: CheckedRun):
        self.run, self.model, self.outer = run, 0, {}
        self.trained: Any = None
        self.added: list[Any] = []

    def begin(self, stage: Any) -> None:
        self.stage, self.added = stage.name, []

    def model_of(self, client: Any) -> int:
        return self.model

    def live(self, stage: Any) -> Any:
        return self.trained

    def add(self, client: Any, weight: float, state: Any, snapshot: Any = None) -> None:
        self.added.append(state)

    def discard(self) -> None:
        self.added = []

    def compare(self, topology: Any, included: Any) -> None: ...

    def judge(self, topology: Any, included: Any, total_weight: float) -> Judgement:
        return Judgement(list(included), total_weight)

    def finish(self, topology: Any, total_weight: float, drift: float = 0.0) -> None:
        run, updates = self.run, self.added
        if topology.peers is not None:
            process_of = {slot: run.job.processes[rank]
                          for slot, rank in enumerate(topology.plan.peers_of(topology.slot_rank))}  # fmt: skip
            updates = topology.peers.meet(topology.slot, updates, process_of)
        now = run.trainer.observer.round_index, self.stage, self.model
        for client, *origin in updates:
            if tuple(origin) != now:
                run.job.found(f"rank {topology.rank} averages a stale update of client {client}: {origin} at {now}")
        clients = sorted(client for client, *_ in updates)
        if clients != sorted(run.decision.included):
            run.job.found(f"rank {topology.rank} averages {clients}, and {run.decision.included} were decided at {now}")
        self.model = hash((self.model, tuple(sorted(updates))))

    def end_round(self, round_index: int) -> None:
        pass


class CheckedRun(Run):
    """A rank's run, whose training and evaluation are pauses."""

    job: Job
    process: Process
    decision: Decision

    @staticmethod
    def of(job: Job, rank: int, process: Process) -> CheckedRun:
        topology = CheckedTopology(job, rank)
        stub: Any = types.SimpleNamespace
        data = stub(prefetch=lambda *_: None, take_skipped=dict)
        clients = [
            stub(index=index, id=f"c{index}", data=data, val=None, position=Position(0, 0), aligner=None)
            for index in topology.plan.clients_of(topology.slot)
        ]
        run = CheckedRun(
            config=CONFIG, strategy=STRATEGY, objective=stub(), topology=topology, engine=stub(device=topology.device),
            trainer=stub(observer=stub(round_index=0)), server=stub(), client_ids=["c0", "c1", "c2"], clients=clients,
            validation={}, num_samples=[8, 8, 8], step_factor=1, center=CENTER, references=None, mixture=CENTER,
        )  # fmt: skip
        run.job, run.process, run.server = job, process, CheckedServer(run)
        run.trainer.run_stage = run.train
        if job.disk:
            newest = max(job.disk)
            run.next_round, run.server.model = newest + 1, job.disk[newest]["model"]
            run.mixture = np.array(job.disk[newest]["mixture"])
        if rank == 0:
            run.coordinator = Coordinator(CONFIG, topology, STRATEGY, run.client_ids, CENTER, run.mixture)
            run.metrics = stub(append=lambda line: None)
            run.checkpoints.coordinator = run.coordinator
        return run

    def train(self, client: Any, stage: Any, global_state: int, loss_weight: float, **_: Any) -> LocalResult:
        draw, world = self.job.world.draw, self.job.world
        world.wait(draw.uniform(0, 2 * TIMEOUT if self.job.is_slow and draw.random() < 0.1 else TIMEOUT / 5))
        here = self.trainer.observer.round_index, stage.name
        self.server.trained = (client.index, *here, global_state)
        is_bad = self.job.is_slow and (client.index, *here) in self.job.bad  # as all ranks of a slot find it
        return LocalResult(_number(*here), 8, "bad" if is_bad else None)

    def agree(self, round_index: int, stage: Any, reports: Any) -> Decision:
        p = self.mixture.tolist()
        self.decision = super().agree(round_index, stage, reports)
        if self.decision.weights != p:
            self.job.found(
                f"rank {self.topology.rank} trains with {p}, and the average is decided with {self.decision.weights}"
            )
        if self.coordinator is not None:
            told = {name: report.train_loss for name, report in self.coordinator.heard.items()}
            if any(number != _number(round_index, stage.name) for number in told.values()):
                self.job.found(f"round {round_index}, {stage.name} is decided by stale reports: {told}")
        return self.decision

    def evaluate(self, round_index: int) -> RankReport:
        self.job.world.wait(self.job.world.draw.uniform(0, TIMEOUT / 10))
        if not self.topology.is_slot_leader:
            return RankReport()
        losses: dict[str, Loss | None] = {
            str(client.index): Loss(1.0 + client.index + round_index, 0.1) for client in self.clients
        }
        return RankReport(losses=losses, positions={client.id: {"epoch": 0, "step": 0} for client in self.clients})

    def end_round(self, round_index: int, report: RankReport) -> Any:
        record = super().end_round(round_index, report)
        mine = self.state_of_round()
        others = self.job.committed.setdefault(round_index, mine)
        if mine != others:
            self.job.found(
                f"round {round_index} ends with {mine} at rank {self.topology.rank}, elsewhere with {others}"
            )
        return record

    def state_of_round(self) -> tuple[Any, ...]:
        return self.server.model, tuple(self.mixture.tolist())

    def save_final_model(self) -> None:
        if self.coordinator is not None and ROUNDS - 1 not in self.job.disk:
            self.job.found("the run ends without its last checkpoint")


def _number(round_index: int, stage: str) -> float:
    return 10 * round_index + int(stage[-1])


def _next_mixture(p: Any, losses: Any, center: Any) -> Any:
    """In place of equation (4), whose set takes time: p moves, by the losses that are known."""
    new = p * np.exp(0.1 * np.where(np.isnan(losses), 0.0, losses))
    return new / new.sum()


class _Quiet:
    """In place of Progress, which opens a console."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _NoMemory:
    peak = 0

    def __init__(self, device: Any): ...

    def begin_stage(self) -> None: ...

    def of_stage(self) -> int:
        return 0


# ---- the disk
def _copy(server: CheckedServer, *_: Any) -> list[Any]:
    return [server.run, server.run.state_of_round()]


def _write(partial: Path, pieces: list[Any], before_each: Any) -> dict[str, Any]:
    run, state = pieces
    draw = run.job.world.draw
    run.job.world.wait(draw.uniform(0, TIMEOUT / 2))
    before_each()
    if run.job.is_slow and draw.random() < 0.05:
        raise OSError(28, "No space left on device")
    return {f"rank {run.topology.rank}": list(state)}


@contextmanager
def checked_modules() -> Iterator[None]:
    """The run's modules in the world's time, with a disk that is a dict."""
    with (
        _only_critical(),
        in_its_own_time("feddra_ds.distributed", "feddra_ds.federation", "feddra_ds.run"),
        patch.object(STRATEGY, "next_mixture", _next_mixture),
        patch.object(robust_weights, "robust_gain", lambda *_: None),
        patch.object(Coordinator, "state", lambda self, round_index: {"round": round_index}),
        patch.object(messages, "_in_thread", _at_once),
        patch.object(rounds, "Progress", _Quiet),
        patch.object(rounds, "copy_server", _copy),
        patch.object(rounds, "Memory", _NoMemory),
        patch.object(checkpoint_writer, "write", _write),
        patch.object(checkpoint_writer, "commit", lambda *args: _disk[-1](*args)),
        patch.object(checkpoint_writer.shutil, "rmtree", lambda *args, **more: None),
    ):
        yield


def _at_once(call: Callable[[], Any]) -> Future[Any]:
    """The world's store answers at once, or waits in the world's time."""
    future: Future[Any] = Future()
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
    return future


@contextmanager
def _only_critical() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


_disk: list[Any] = []


# ---- a schedule
ENDS_WELL = (type(None), TooFewClients, WaitTimeout, CheckpointNotWritten, torch.distributed.DistNetworkError)


def simulate(seed: int) -> None:
    """One schedule, from its first start to its last. Raises Violation."""
    world = World(seed, nap=TIMEOUT / 2, limit=LIMIT)
    draw = world.draw
    kind = draw.choice(["calm", "store", "ranks", "all"])
    is_hard = kind in ("store", "all")
    faults = Faults(
        late=draw.choice([0.0, 0.3]),
        delay=TIMEOUT * (draw.choice([0.02, 0.3, 1.5]) if is_hard else 0.02),
        lost=draw.choice([0.0, 0.02]) if is_hard else 0.0,
        twice=draw.choice([0.0, 0.2]) if is_hard else 0.0,
    )
    world_size, per_slot = draw.choice(LAYOUTS)
    disk: dict[int, dict[str, Any]] = {}
    committed: dict[int, Any] = {}
    for _ in range(draw.choice([1, 1, 2]) if kind != "calm" else 1):
        bad = {(draw.randrange(3), draw.randrange(ROUNDS), draw.choice(["stage1", "stage2"]))}
        job = Job(world, plan(world_size, 3, per_slot), faults, kind in ("ranks", "all"), disk, bad)

        def commit(folder: Path, state: str, files: dict[str, Any], keep: int, job: Job = job) -> None:
            world.wait(draw.uniform(0, TIMEOUT / 20))
            number, written = int(folder.name[-6:]), {str(state) for state in files.values()}
            if len(written) != 1:
                job.found(f"the checkpoint of round {number} is made of {written}")
            model, mixture = next(iter(files.values()))
            disk[number] = {"model": model, "mixture": mixture}
            committed[number] = model, tuple(mixture)

        _disk.append(commit)
        job.start()
        if job.is_slow:
            for process in job.processes:
                when, what = world.now + draw.uniform(0, 2 * ROUNDS * TIMEOUT), draw.random()
                if what < 0.15:
                    world.at(when, lambda process=process: world.kill(process))
                elif what < 0.5:
                    for_s = draw.choice([0.5, 1.5, 5.0]) * TIMEOUT
                    world.at(when, lambda process=process, for_s=for_s: world.stop(process, for_s))
            if draw.random() < 0.3:
                world.at(world.now + draw.uniform(0, 2 * ROUNDS * TIMEOUT), job.kill)
        world.limit = world.now + LIMIT
        world.run()
        _disk.pop()
        for number, state in committed.items():
            if number in job.committed and job.committed[number] != state:
                raise Violation(
                    f"round {number} was committed as {state}, the ranks ended it with {job.committed[number]}"
                )
        for process in job.processes:
            if not isinstance(process.outcome, ENDS_WELL):
                raise Violation(f"{process.name} ended with {process.outcome!r}") from process.outcome
            if kind == "calm" and process.outcome is not None:
                raise Violation(f"{process.name} ended with {process.outcome!r}, though nothing went wrong")


def check_schedules(first: int, count: int) -> str | None:
    """What is wrong with the first of these schedules that is, or None."""
    with checked_modules():
        for seed in range(first, first + count):
            try:
                simulate(seed)
            except Violation as error:
                return f"schedule {seed}: {error}"
    return None


def test_no_schedule_breaks_the_agreement() -> None:
    processes = 1 if SCHEDULES < 10_000 else os.cpu_count() or 1
    if processes == 1:
        found = [check_schedules(FIRST, SCHEDULES)]
    else:
        share = math.ceil(SCHEDULES / processes)
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(check_schedules, range(FIRST, FIRST + SCHEDULES, share), [share] * processes))
    assert not [told for told in found if told is not None]


def _later_regroup(self: Topology, live_slots: Any, generation: int) -> None:
    self.live_slots = tuple(live_slots)
    self.peers = self._join_peers(0)


MUTATIONS = {
    "a decision without its round": (protocol_module, "_decision", lambda round_index, stage: f"{stage}/decision"),
    "a report without its round": (protocol_module, "_slot", lambda round_index, stage, slot: f"{stage}/slot/{slot}"),
    "a regroup under the old generation": (Topology, "drop_slots", _later_regroup),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_defect_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker can fail: each of these was a line of the code, changed."""
    module, attribute, instead = MUTATIONS[name]
    monkeypatch.setattr(module, attribute, instead)
    assert check_schedules(0, 400) is not None
