"""The round loop: `Run.rounds` is the paper's algorithm on a page. `build.py` puts the pieces together."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feddra_ds.checkpoint.format import SHARED, folder_of
from feddra_ds.checkpoint.restore import export_checkpoint
from feddra_ds.common.errors import CheckpointNotWritten, DataError, TooFewClients
from feddra_ds.common.logs import logger
from feddra_ds.config.schema import Config
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.aggregation.held import Judgement
from feddra_ds.federation.aggregation.peers import gather_over_peers
from feddra_ds.federation.client import Client, LocalTrainer
from feddra_ds.federation.coordinator import Coordinator
from feddra_ds.federation.protocol import ClientReport, Decision, Loss, Protocol, RankReport
from feddra_ds.federation.record import RoundRecord
from feddra_ds.federation.references import References
from feddra_ds.federation.saving import copy_server
from feddra_ds.federation.schedule import Stage, draws_of_round, stages_of_round, steps_per_round
from feddra_ds.federation.server import Server
from feddra_ds.federation.validation import Embedded, embed, measure_loss, retrieval
from feddra_ds.objectives import Objective
from feddra_ds.run import stop_request
from feddra_ds.run.checkpoint_writer import CheckpointWriter, Due
from feddra_ds.run.debug import deterministic
from feddra_ds.run.memory import Memory
from feddra_ds.run.metrics_file import MetricsFile
from feddra_ds.run.progress import Progress
from feddra_ds.run.trackers import Trackers
from feddra_ds.strategies import Strategy, robust_weights
from feddra_ds.strategies.base import Draws
from feddra_ds.strategies.mixture_set import Vector

STAGE_NAMES = ("stage1", "stage2", "aggregate", "evaluate", "checkpoint")


@dataclass
class Run:
    """Everything of one rank of one run. Built by `build.build`."""

    # what was asked for
    config: Config
    strategy: Strategy
    objective: Objective
    # this rank's place and engine
    topology: Topology
    engine: Engine
    trainer: LocalTrainer
    server: Server
    # the data owners: all ids, and those that this rank's slot hosts
    client_ids: list[str]
    clients: list[Client]
    validation: dict[str, ClientData]  # of evaluation.split, by client id
    num_samples: list[int]  # training pairs of every client
    step_factor: int  # how many times the schedule's steps every client takes
    center: Vector  # c of equation (4)
    references: References | None  # the clients' own models, for dro.loss = excess
    # the federation's state, equal on all ranks: p of the round that runs, and the next round
    mixture: Vector
    next_round: int = 0
    stops: bool = False  # whether the round that ended is the last one of this start
    not_saved: str | None = None  # why there is no checkpoint of the last round of this start
    norm_limits: dict[str, float | None] = field(default_factory=dict)  # by stage: the largest update that is averaged
    # rank 0 only
    coordinator: Coordinator | None = None
    metrics: MetricsFile | None = None
    trackers: Trackers | None = None
    # of the round that runs: seconds by stage, and L_i by client index where dro.evaluate_on = anchors reads them off
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    anchor_losses: dict[str, Loss | None] = field(default_factory=dict)
    draws: Draws = field(init=False)  # how often each client was drawn for it
    present: list[Client] = field(default_factory=list)  # this slot's clients that take part
    # and the local steps that were skipped, by client and stage; by stage, bytes sent and memory taken
    skipped_steps: dict[str, dict[str, int]] = field(default_factory=dict)
    stage_bytes: dict[str, int] = field(default_factory=dict)
    stage_memory: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_dir = Path(self.config.run.output_dir)
        self.draws, self.present = np.ones(len(self.client_ids), dtype=np.int64), self.clients
        self.protocol, self.memory = Protocol(self.topology), Memory(self.engine.device)
        self.checkpoints = CheckpointWriter(self.protocol)
        self.progress = Progress(
            self.run_dir,
            strategy=self.config.strategy.name,
            clients=[client.id for client in self.clients],
            num_rounds=self.config.schedule.rounds,
            steps_per_round=steps_per_round(self.config, self.step_factor),
            batch_size=self.config.data.batch_size,
            num_slots=self.topology.plan.num_slots,
            enabled=self.topology.is_coordinator,
        )

    def rounds(self) -> None:
        """All rounds that are left, then the final model; fewer, and none, where a rank is asked to stop (`stops`)."""
        with self.progress, deterministic(self.config.debug.deterministic), self.checkpoints:
            for round_index in range(self.next_round, self.config.schedule.rounds):
                self.progress.begin_round(round_index)
                self.trainer.observer.round_index = round_index
                self.draw_clients(round_index)
                began, self.seconds, bytes_before = time.monotonic(), defaultdict(float), self.server.num_bytes
                samples, self.skipped_steps, self.stage_bytes, self.stage_memory = 0, {}, {}, {}
                for stage in self.stages(round_index):
                    with self.counted(stage):
                        samples += self.run_stage(round_index, stage)
                self.server.end_round(round_index)
                report = replace(
                    self.evaluate(round_index),
                    samples=samples if self.topology.is_slot_leader else 0,  # the slot's ranks share its pairs
                    bytes=self.server.num_bytes - bytes_before,
                    memory=self.memory.peak,
                    stage_bytes=self.stage_bytes,
                    stage_memory=self.stage_memory,
                    asks_to_stop=stop_request.is_asked(),
                )
                record = self.end_round(round_index, report)
                with self.timed("checkpoint"):
                    self.save(round_index, record)
                if record is not None:
                    self.record(record, time.monotonic() - began)
                self.check_saved()
                if self.stops:
                    what_is_left = "after a checkpoint" if self.not_saved is None else f"but {self.not_saved}"
                    self.progress.stopped = f"asked to by SIGUSR1, {what_is_left}"
                    return
            with self.timed("model"):
                self.save_final_model()

    def stages(self, round_index: int) -> list[Stage]:
        """The stages of a round, in order."""
        takes_snapshot = self.strategy.takes_snapshot
        return stages_of_round(self.config, round_index, self.step_factor, takes_snapshot=takes_snapshot)

    def draw_clients(self, round_index: int) -> None:
        """Who trains in this round: the same on every rank."""
        self.draws = draws_of_round(self.config, round_index, self.mixture, by_weight=self.strategy.draws_by_weight)
        self.present = [client for client in self.clients if self.draws[client.index]]
        if self.coordinator is not None:
            self.coordinator.draws = self.draws

    def run_stage(self, round_index: int, stage: Stage) -> int:
        """This slot's clients that take part train from the global model; the average becomes it. Returns pairs trained on."""
        reports: dict[int, ClientReport] = {}
        self.progress.begin_stage(stage)
        if stage.averages:
            self.server.begin(stage)
        with self.timed(stage.name):
            for client in self.present:
                result = self.trainer.run_stage(
                    client,
                    stage,
                    self.server.model_of(client),
                    self.strategy.loss_weight(self.mixture, client.index),
                    on_step=self.progress.begin_client(client.id),
                    outer=self.server.outer,
                    norm_limit=self.norm_limits.get(stage.name),
                )
                self.prefetch_after(client)
                reports[client.index] = result.report()
                if result.num_skipped:
                    self.skipped_steps.setdefault(client.id, {})[stage.name] = result.num_skipped
                if stage.averages and result.problem is None and not stage.moves_mixture:
                    weight = self.average_weight(client)
                    self.server.add(client, weight, self.server.live(stage), result.snapshot)
        if stage.averages:
            with self.timed("aggregate"):
                self.average(round_index, stage, reports)
        else:  # one synchronisation a round: the clients go on with their own aligners
            self.progress.end_stage(stage, {self.client_ids[i]: told for i, told in reports.items()}, slot_only=True)
        return sum(report.pairs for report in reports.values())

    def average(self, round_index: int, stage: Stage, reports: dict[int, ClientReport]) -> None:
        """Agree on who takes part and with which weight, and make their average the global model."""
        decision = self.agree(round_index, stage, reports)
        if stage.moves_mixture:  # p was not known before; the aligners wait on the host
            self.anchor_losses = {str(index): told.loss for index, told in reports.items()}
            for client in self.present:
                if client.index in decision.included and client.aligner is not None:
                    self.server.add(client, self.average_weight(client), client.aligner)
                if not stage.hands_on_aligner:
                    client.aligner = None
        self.norm_limits[stage.name] = decision.norm_limit
        if not decision.is_used:
            self.server.discard()
            return
        with self.topology.peers_meet(f"comparing updates in round {round_index}, {stage.name}"):
            self.server.compare(self.topology, decision.included)
        judgement = self.server.judge(self.topology, decision.included, decision.total_weight)
        self.heed(round_index, stage, judgement)
        with self.topology.peers_meet(f"the average of round {round_index}, {stage.name}"):
            self.server.finish(self.topology, judgement.total_weight, decision.drift)

    def heed(self, round_index: int, stage: Stage, judgement: Judgement) -> None:
        """Name whom the updates themselves have excluded, which all ranks know. Raises TooFewClients."""
        if self.coordinator is not None:
            self.coordinator.note_judgement(round_index, stage.name, judgement)
        num, minimum = len(judgement.included), self.config.clients.minimum
        if num < minimum:
            self.protocol.leave(round_index, stage.name, self.topology.live_slots)
            reasons = (f"; {self.client_ids[i]}: {reason}" for i, reason in judgement.excluded.items())
            raise TooFewClients(f"round {round_index}, {stage.name}: {num} updates can be averaged, clients.minimum is {minimum}"
                                + "".join(reasons))  # fmt: skip

    def average_weight(self, client: Client) -> float:
        weights = robust_weights.never_zero(self.strategy.average_weight(self.mixture, self.draws), self.center)
        return float(weights[client.index])

    def prefetch_after(self, client: Client) -> None:
        """Let the readers start on what comes next (the next client, or the next stage of the first), while we average."""
        following = self.present[(self.present.index(client) + 1) % len(self.present)]
        following.data.prefetch(following.position, 1)

    def agree(self, round_index: int, stage: Stage, reports: dict[int, ClientReport]) -> Decision:
        """Report to the coordinator and hear who is averaged. Raises TooFewClients."""
        topology = self.topology
        if topology.is_slot_leader:
            self.protocol.tell_stage(round_index, stage.name, reports)
        if self.coordinator is not None:
            decision = self.coordinator.decide(round_index, stage.name)
            self.progress.end_stage(stage, self.coordinator.heard)
        else:
            decision = self.protocol.hear_decision(round_index, stage.name)
        if decision.stop is not None:
            self.protocol.leave(round_index, stage.name, decision.live_slots)
            raise TooFewClients(f"round {round_index}, {stage.name}: {decision.stop}")
        if topology.slot not in decision.live_slots:
            raise TooFewClients(f"slot {topology.slot} was dropped: it did not report within clients.timeout_s")
        if tuple(decision.live_slots) != topology.live_slots:
            topology.drop_slots(decision.live_slots, decision.generation)
        self.mixture = np.asarray(decision.weights, dtype=np.float64)
        return decision

    def measures_losses(self, round_index: int) -> bool:
        """Whether L_i of this round's model is measured at its end; else the next round reads it off its anchors."""
        return self.config.dro.evaluate_on != "anchors" or round_index == self.config.schedule.rounds - 1

    def evaluate(self, round_index: int) -> RankReport:
        """L_i of this slot's clients under the new global model, and retrieval where it is due."""
        with self.timed("evaluate"):
            every, last = self.config.evaluation.every, self.config.schedule.rounds - 1
            told = (
                self.measure_losses(round_index)
                if self.measures_losses(round_index)
                else RankReport(losses=self.anchor_losses)
            )
            due = every > 0 and ((round_index + 1) % every == 0 or round_index == last)
            val = self.retrieve() if due else {}
        skipped: dict[str, dict[str, int]] = {}
        for client in self.clients:
            sources = {client.data, client.val, self.validation.get(client.id)}  # the last two may be one
            counts = (Counter(source.take_skipped()) for source in sources if source is not None)
            skipped[client.id] = dict(sum(counts, Counter()))
        if not self.topology.is_slot_leader:
            return RankReport(val=val, skipped=skipped)
        positions = {client.id: client.position.to_dict() for client in self.clients}
        return replace(told, positions=positions, val=val, skipped=skipped, skipped_steps=self.skipped_steps)

    def measure_losses(self, round_index: int) -> RankReport:
        """L_i of this slot's clients; on training pairs too, and of the clients' own models, where they are asked for.

        Where a snapshot was taken, L_i of that as well.
        """
        draw = round_index if self.config.dro.evaluation_sample == "fresh" else None
        told = RankReport()
        for client in self.clients:
            index, data = str(client.index), client.val or client.data
            self.server.show(client)
            with self.readable(client.id, "no loss, so p keeps its weight"):
                told.losses[index] = self.loss_of(data, draw)
                if data is not client.data:
                    told.train_losses[index] = self.loss_of(client.data, draw)
                if self.references is not None:
                    told.references[index] = self.references.loss_of(client, draw, self.loss_of)
        if self.server.snapshot is not None:
            self.engine.write(self.server.snapshot)
            self.server.snapshot = None
            for client in self.clients:
                with self.readable(client.id, "no loss of the snapshot, so p keeps its weight"):
                    told.snapshot_losses[str(client.index)] = self.loss_of(client.val or client.data, draw)
        return told

    def loss_of(self, data: ClientData, draw: int | None) -> Loss:
        """Of the model in the engine, on the sample `draw` of a client's pairs."""
        return measure_loss(self.engine, data, self.objective, self.config, self.topology, draw)

    def retrieve(self) -> dict[str, dict[str, float]]:
        """Retrieval per client (at its slot's leader) and over the pooled gallery (at the coordinator)."""
        samples: list[Embedded] = []
        out: dict[str, dict[str, float]] = {}
        for client in self.clients:
            for name, data in self.validation_of(client).items():
                self.server.show(client)
                with self.readable(name, "no retrieval"):
                    sample = embed(self.engine, data, self.config.evaluation.max_pairs, self.config, self.topology)
                    samples.append(sample)
                    out[name] = retrieval(sample)
        if not self.topology.is_slot_leader:
            return {}
        if not samples:  # of a slot whose clients cannot be read
            none = torch.zeros(0, self.config.model.embedding_dim)
            samples.append(Embedded(none, none, torch.zeros(0, dtype=torch.int64), 1.0))
        with self.topology.peers_meet("retrieval over all clients"):
            pooled = [
                torch.cat(gather_over_peers(torch.cat(x), self.topology))
                for x in zip(*((s.image, s.text, s.text_ids) for s in samples), strict=True)
            ]
        if self.coordinator is not None and self.strategy.averages and len(pooled[0]):
            out["all"] = retrieval(Embedded(pooled[0], pooled[1], pooled[2], 1.0))
        return out

    def validation_of(self, client: Client) -> dict[str, Any]:
        """Evaluation data by name: the client's own, or everybody's for the centralised strategy."""
        return self.validation if self.strategy.pools_data else {client.id: self.validation[client.id]}

    def end_round(self, round_index: int, report: RankReport) -> RoundRecord | None:
        """Every rank reports, p moves (equation (4)) and all hear the next; the round's record at the coordinator."""
        with self.timed("aggregate"):
            self.protocol.tell_round(round_index, report)
            record = None
            if self.coordinator is not None:
                record = self.coordinator.end_round(round_index, moves_mixture=self.measures_losses(round_index))
                if self.config.clients.per_round is not None or self.strategy.draws_by_weight:
                    record["present_clients"] = np.repeat(self.client_ids, self.draws).tolist()
            following = self.protocol.hear_next(round_index)
            self.mixture = np.asarray(following.weights, dtype=np.float64)
            self.stops = following.stops and round_index + 1 < self.config.schedule.rounds
        return record

    def save(self, round_index: int, record: RoundRecord | None) -> None:
        """Begin a checkpoint where one is due (checkpoint.every, and after the last round, or where the run stops).

        What it holds is copied here and written beside the next round. The one before is waited for; after the last round
        this one is too, and all ranks hear what became of it.
        """
        is_last = round_index + 1 == self.config.schedule.rounds or self.stops
        if (round_index + 1) % self.config.checkpoint.every and not is_last:
            return
        self.checkpoints.wait()
        state = None
        if self.coordinator is not None:  # with the record, lest a kill before `record` lose the line
            state = json.dumps(self.coordinator.state(round_index) | {"metrics": record}, indent=1)
        folder, pieces = folder_of(self.run_dir, round_index), copy_server(self.server, self.clients, self.topology)
        ranks = self.topology.live_ranks
        self.checkpoints.begin(Due(round_index, folder, pieces, ranks, self.config.checkpoint.keep, state))
        if not is_last:
            return
        self.checkpoints.wait()
        if self.coordinator is not None:
            self.protocol.tell_kept(round_index, self.coordinator.not_saved)
        self.not_saved = self.protocol.hear_kept(round_index)

    def check_saved(self) -> None:
        """Raises CheckpointNotWritten where the run cannot end without the checkpoint that could not be written."""
        if self.not_saved is None or (self.stops and self.config.checkpoint.on_error == "continue"):
            return
        lost = "it was asked to stop" if self.stops else "without it there is no final model"
        raise CheckpointNotWritten(
            f"{self.not_saved}; {lost}: make room, and the same command does the rounds again since the last checkpoint"
        )

    def record(self, record: RoundRecord, seconds: float) -> None:
        """Write the round's line of metrics.jsonl, and tell the trackers, with the coordinator's own clock."""
        record["seconds"] = seconds
        record["stage_seconds"] = {name: self.seconds[name] for name in STAGE_NAMES}
        record["checkpoint_writer_seconds"] = self.checkpoints.take_seconds()
        assert self.metrics is not None
        self.metrics.append(record)
        self.progress.end_round(record)
        if self.trackers is not None:
            self.trackers.log(record)

    def save_final_model(self) -> None:
        """model/ from the last checkpoint, by the coordinator alone, tensor by tensor: no rank gathers anything for it."""
        if self.coordinator is None:
            return
        newest = folder_of(self.run_dir, self.config.schedule.rounds - 1)
        for owner in [SHARED] if self.strategy.averages else self.client_ids:
            export_checkpoint(newest, owner, self.run_dir / "model" / ("" if owner == SHARED else owner))

    @contextmanager
    def readable(self, client: str, without: str) -> Iterator[None]:
        """Go on where a client's data cannot be read; all ranks of its slot learn it together."""
        try:
            yield
        except DataError as error:
            if self.topology.is_slot_leader:
                logger.warning("client %s: %s: %s", client, without, error)

    @contextmanager
    def counted(self, stage: Stage) -> Iterator[None]:
        """Keep what a stage sends and takes, its average with it."""
        before = self.server.num_bytes
        self.memory.begin_stage()
        yield
        self.stage_bytes[stage.name] = self.server.num_bytes - before
        self.stage_memory[stage.name] = self.memory.of_stage()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.progress.enter(name)
        yield
        self.seconds[name] += time.monotonic() - began
