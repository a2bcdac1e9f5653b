"""The round loop: `Run.rounds` is ALGORITHM 6 on a page. `build.py` puts the pieces together."""

from __future__ import annotations

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feddra_ds.checkpoint.format import SHARED, Files, folder_of, partial_of
from feddra_ds.checkpoint.restore import export_checkpoint
from feddra_ds.checkpoint.write import commit
from feddra_ds.common.errors import TooFewClients
from feddra_ds.config.schema import Config
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.aggregation.peers import gather_over_peers
from feddra_ds.federation.client import Client, LocalTrainer
from feddra_ds.federation.coordinator import Coordinator, Decision, aggregation_weights, loss_weight
from feddra_ds.federation.saving import write_server
from feddra_ds.federation.schedule import Stage, stages_of_round, steps_per_round
from feddra_ds.federation.server import Server
from feddra_ds.federation.validation import Embedded, client_loss, embed, evaluation_size, retrieval
from feddra_ds.run.metrics_file import MetricsFile
from feddra_ds.run.progress import Progress
from feddra_ds.strategies.base import Strategy

STAGE_NAMES = ("stage1", "stage2", "aggregate", "evaluate", "checkpoint")


class Run:
    """Everything of one rank of one run. Built by `build.build`."""

    # what was asked for
    config: Config
    strategy: Strategy
    # this rank's place and engine
    topology: Topology
    engine: Engine
    trainer: LocalTrainer
    server: Server
    # the data owners: all ids, and those that this rank's slot hosts
    client_ids: list[str]
    clients: list[Client]
    validation: dict[str, Any]  # client id → ClientData of evaluation.split
    num_samples: list[int]  # training pairs of every client
    # the federation's state, equal on all ranks: p of the round that runs, and the next round
    weights: np.ndarray
    next_round: int
    # rank 0 only
    coordinator: Coordinator | None
    metrics: MetricsFile | None
    monitor: Any

    def __init__(self, **pieces: Any):
        self.__dict__.update(pieces)
        self.seconds: dict[str, float] = defaultdict(float)
        self.anchor_losses: dict[str, float | None] = {}  # of this round's stage 1, where dro.evaluate_on = anchors
        self.run_dir = Path(self.config.run.output_dir)
        self.progress = Progress(
            self.run_dir,
            strategy=self.config.strategy.name,
            clients=[client.id for client in self.clients],
            num_rounds=self.config.schedule.rounds,
            steps_per_round=steps_per_round(self.config),
            batch_size=self.config.data.batch_size,
            num_slots=self.topology.plan.num_slots,
            enabled=self.topology.is_coordinator,
        )

    def rounds(self) -> None:
        """All rounds that are left, then the final model."""
        with self.progress:
            for round_index in range(self.next_round, self.config.schedule.rounds):
                self.progress.begin_round(round_index)
                began, self.seconds, bytes_before = time.monotonic(), defaultdict(float), self.server.num_bytes
                samples = 0
                for stage in stages_of_round(self.config, round_index):
                    samples += self.run_stage(round_index, stage)
                report = self.evaluate(round_index)
                report |= {
                    "samples": samples if self.topology.is_slot_leader else 0,  # the slot's ranks share its pairs
                    "bytes": self.server.num_bytes - bytes_before,
                    "memory": peak_memory(self.engine),
                }
                line = self.update_weights(round_index, report)
                with self.timed("checkpoint"):
                    self.save(round_index, line)
                self.record(line, time.monotonic() - began)
            with self.timed("model"):
                self.save_final_model()

    def run_stage(self, round_index: int, stage: Stage) -> int:
        """Every client of this slot trains from the global model; their average becomes it. Returns pairs trained on."""
        aggregates = (
            stage.trains_backbone or self.config.aggregate.after_stage1 or self.config.schedule.stage2_steps == 0
        )
        moves_weights = self.config.dro.evaluate_on == "anchors" and not stage.trains_backbone
        reports: dict[str, dict[str, Any]] = {}
        samples = 0
        self.progress.begin_stage(stage)
        if aggregates:
            self.server.begin(stage)
        with self.timed(stage.name):
            for client in self.clients:
                result = self.trainer.run_stage(
                    client,
                    stage,
                    self.server.model_of(client),
                    loss_weight(self.config, self.weights, client.index),
                    on_step=self.progress.begin_client(client.id),
                )
                self.prefetch_after(client, stage)
                reports[str(client.index)] = result.report()
                samples += result.num_pairs
                if aggregates and result.problem is None and not moves_weights:
                    self.server.add(client, self.aggregation_weight(client), self.server.live(stage))
        if not aggregates:  # one synchronisation a round: the clients go on with their own aligners
            mine = {client.id: reports[str(client.index)] for client in self.clients}
            self.progress.end_stage(stage, mine, slot_only=True)
            return samples
        with self.timed("aggregate"):
            decision = self.agree(round_index, stage, reports)
            if moves_weights:  # p was not known before; the aligners wait on the host
                self.anchor_losses = {index: told["loss"] for index, told in reports.items()}
                for client in self.clients:
                    if client.index in decision.included and client.aligner is not None:
                        self.server.add(client, self.aggregation_weight(client), client.aligner)
            with self.topology.peers_meet(f"the average of round {round_index}, {stage.name}"):
                self.server.finish(self.topology, decision.total_weight)
        return samples

    def aggregation_weight(self, client: Client) -> float:
        return float(aggregation_weights(self.config, self.weights)[client.index])

    def prefetch_after(self, client: Client, stage: Stage) -> None:
        """Let the readers start on what comes next (the next client, or the next stage of the first), while we average."""
        following = self.clients[(self.clients.index(client) + 1) % len(self.clients)]
        following.data.prefetch(following.position, 1)

    def agree(self, round_index: int, stage: Stage, reports: dict[str, dict[str, Any]]) -> Decision:
        """Report to the coordinator and hear who is averaged. Raises TooFewClients."""
        topology, place = self.topology, f"round/{round_index}/{stage.name}"
        if topology.is_slot_leader:
            topology.post(f"{place}/slot/{topology.slot}", reports)
        if self.coordinator is not None:
            decision = self.coordinator.decide(round_index, stage.name)
            self.progress.end_stage(stage, self.coordinator.heard)
        else:
            # the coordinator may itself wait timeout_s for another slot after its own training
            message = topology.fetch(
                f"{place}/decision", sender="the coordinator (rank 0)", timeout_s=3 * topology.timeout_s
            )
            decision = Decision.from_message(message)
        if decision.stop is not None:
            topology.leave_after_reading(f"{place}/stop", decision.live_slots)
            raise TooFewClients(f"round {round_index}, {stage.name}: {decision.stop}")
        if topology.slot not in decision.live_slots:
            raise TooFewClients(f"slot {topology.slot} was dropped: it did not report within clients.timeout_s")
        if tuple(decision.live_slots) != topology.live_slots:
            topology.drop_slots(decision.live_slots, decision.generation)
        self.weights = np.asarray(decision.weights, dtype=np.float64)
        return decision

    def evaluate(self, round_index: int) -> dict[str, Any]:
        """L_i of this slot's clients under the new global model, and retrieval where it is due."""
        with self.timed("evaluate"):
            every, last = self.config.evaluation.every, self.config.schedule.rounds - 1
            losses = self.anchor_losses
            if self.config.dro.evaluate_on == "sample" or round_index == last:
                losses = self.evaluate_losses()
            due = every > 0 and ((round_index + 1) % every == 0 or round_index == last)
            val = self.retrieve() if due else {}
        skipped: dict[str, dict[str, int]] = {}
        for client in self.clients:
            sources = [client.data, *([self.validation[client.id]] if client.id in self.validation else [])]
            skipped[client.id] = dict(sum((Counter(source.take_skipped()) for source in sources), Counter()))
        leader = self.topology.is_slot_leader
        return {
            "losses": losses if leader else {},
            "positions": {client.id: client.position.to_dict() for client in self.clients} if leader else {},
            "val": val,
            "skipped": skipped,
        }

    def evaluate_losses(self) -> dict[str, float | None]:
        """L_i of this slot's clients by index, on their fixed samples."""
        pairs = evaluation_size(self.config, self.num_samples)
        losses: dict[str, float | None] = {}
        for client in self.clients:
            self.server.show(client)
            losses[str(client.index)] = client_loss(self.engine, client, pairs, self.config, self.topology)
        return losses

    def retrieve(self) -> dict[str, dict[str, float]]:
        """Retrieval per client (at its slot's leader) and over the pooled gallery (at the coordinator)."""
        samples: list[Embedded] = []
        out: dict[str, dict[str, float]] = {}
        for client in self.clients:
            for name, data in self.validation_of(client).items():
                self.server.show(client)
                sample = embed(self.engine, data, self.config.evaluation.max_pairs, self.config, self.topology)
                samples.append(sample)
                out[name] = retrieval(sample)
        if not self.topology.is_slot_leader:
            return {}
        with self.topology.peers_meet("retrieval over all clients"):
            pooled = [
                torch.cat(gather_over_peers(torch.cat(x), self.topology))
                for x in zip(*((s.image, s.text, s.text_ids) for s in samples), strict=True)
            ]
        if self.coordinator is not None and self.strategy.averages:
            out["all"] = retrieval(Embedded(pooled[0], pooled[1], pooled[2], 1.0))
        return out

    def validation_of(self, client: Client) -> dict[str, Any]:
        """Evaluation data by name: the client's own, or everybody's for the centralised strategy."""
        return self.validation if self.strategy.pools_data else {client.id: self.validation[client.id]}

    def update_weights(self, round_index: int, report: dict[str, Any]) -> dict[str, Any]:
        """Equation (4) at the coordinator; every rank hears the next p. Returns the round's line at the coordinator."""
        with self.timed("aggregate"):
            topology = self.topology
            topology.post(f"round/{round_index}/rank/{topology.rank}", report)
            line: dict[str, Any] = {}
            if self.coordinator is not None:
                reports = self.coordinator.collect(round_index)
                line = self.coordinator.metrics(round_index, reports)
                if self.config.dro.evaluate_on == "sample" or round_index == self.config.schedule.rounds - 1:
                    self.coordinator.weights = self.coordinator.next_weights(line["client_losses"])
                    line["next_client_weights"] = self.coordinator.weights.tolist()
                self.coordinator.excluded = []
                topology.post(f"round/{round_index}/next", self.coordinator.weights.tolist())
            message = topology.fetch(
                f"round/{round_index}/next", sender="the coordinator (rank 0)", timeout_s=3 * topology.timeout_s
            )
            self.weights = np.asarray(message, dtype=np.float64)
        return line

    def save(self, round_index: int, line: dict[str, Any]) -> None:
        """An atomic checkpoint where one is due (checkpoint.every, and after the last round)."""
        if (round_index + 1) % self.config.checkpoint.every and round_index + 1 < self.config.schedule.rounds:
            return
        topology = self.topology
        folder = folder_of(self.run_dir, round_index)
        every_slot_writes = not self.strategy.averages or self.server.residuals is not None
        writers = topology.live_ranks if every_slot_writes else range(topology.plan.ranks_per_slot)
        files: Files = {}
        if topology.rank in writers:
            files = write_server(partial_of(folder), self.server, self.clients, topology)
            topology.post(f"saved/{round_index}/{topology.rank}", files)
        if self.coordinator is not None:
            for rank in writers:
                key = f"saved/{round_index}/{rank}"
                files |= topology.fetch(key, sender=f"rank {rank}")
                topology.forget(key)
            state = self.coordinator.state(round_index) | {"metrics": line}  # lest a kill before `record` lose the line
            commit(folder, state, files, self.config.checkpoint.keep)

    def record(self, line: dict[str, Any], seconds: float) -> None:
        """Write the round's line of metrics.jsonl and its scalars; the coordinator's own clock."""
        if self.coordinator is None or self.metrics is None:
            return
        line |= {"seconds": seconds, "stage_seconds": {name: self.seconds[name] for name in STAGE_NAMES}}
        self.metrics.append(line)
        self.progress.end_round(line)
        if self.monitor is not None:
            step = line["round"]
            events = [("loss/mean", line["mean_loss"], step), ("loss/worst", line["worst_loss"], step)]
            for i, client in enumerate(self.client_ids):
                events.append((f"weights/{client}", line["client_weights"][i], step))
                if line["client_losses"][i] is not None:
                    events.append((f"loss/{client}", line["client_losses"][i], step))
            for name, values in line["val"].items():
                events += [(f"val/{name}/{key}", value, step) for key, value in values.items()]
            self.monitor.write_events(events)

    def save_final_model(self) -> None:
        """model/ from the last checkpoint, by the coordinator alone, tensor by tensor: no rank gathers anything for it."""
        if self.coordinator is None:
            return
        newest = folder_of(self.run_dir, self.config.schedule.rounds - 1)
        for owner in [SHARED] if self.strategy.averages else self.client_ids:
            export_checkpoint(newest, owner, self.run_dir / "model" / ("" if owner == SHARED else owner))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.progress.enter(name)
        yield
        self.seconds[name] += time.monotonic() - began


def peak_memory(engine: Engine) -> int:
    """Peak bytes of this rank: of the device where there is one, else resident on the host."""
    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(engine.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
