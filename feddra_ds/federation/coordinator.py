"""Rank 0's part of a round: who takes part, the weights p, what is committed. It moves no model data.

The protocol, by key of the store (every value a small JSON):
    round/R/STAGE/slot/S     from each slot's leader, per client: why its update cannot be averaged (null: it can), the
                             loss read off its anchors (null: none was), its mean training loss (null: not finite) and
                             the pairs it trained on
    round/R/STAGE/decision   to all: clients averaged, p, exclusions, slots that still take part
    round/R/rank/K           from each rank at the round's end: losses L_i, positions, bytes, memory, skipped samples
    round/R/next             to all: p of the next round
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from feddra_ds.common.errors import WaitTimeout
from feddra_ds.common.logs import logger
from feddra_ds.common.text import by_reason, listed
from feddra_ds.config.schema import Config
from feddra_ds.distributed.topology import Topology
from feddra_ds.strategies.base import Strategy, Vector


@dataclass(frozen=True)
class Decision:
    """What a stage's average is made of."""

    included: list[int]  # indices of the clients
    total_weight: float  # Σ of their aggregation weights
    weights: list[float]  # p, moved by the losses where they came with this stage
    excluded: list[dict[str, str]]  # {id, reason}
    live_slots: list[int]
    generation: int  # grows whenever slots are dropped
    stop: str | None = None  # why the run must end

    @staticmethod
    def from_message(message: dict[str, Any]) -> Decision:
        return Decision(**message)


@dataclass
class Coordinator:
    """State of the federation, all of it saved with every checkpoint."""

    config: Config
    topology: Topology
    strategy: Strategy
    client_ids: list[str]
    center: Vector
    weights: Vector
    positions: dict[str, dict[str, int]] = field(default_factory=dict)
    excluded: list[dict[str, str]] = field(default_factory=list)  # of the round that runs
    heard: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each client's slot told of the last stage
    _stale: list[str] = field(default_factory=list)  # keys of the last round, read by everyone

    def aggregation_weights(self) -> Vector:
        """The weights of the server's average: p, or uniform where p acts in the loss alone (ALGORITHM 5)."""
        return aggregation_weights(self.config, self.weights)

    def decide(self, round_index: int, stage: str) -> Decision:
        """Hear every slot (a bounded time, all together), decide who is averaged, and tell all."""
        topology = self.topology
        deadline = time.monotonic() + self.config.clients.timeout_s
        problems: dict[int, str | None] = {}
        losses: list[float | None] = [None] * len(self.client_ids)
        live, lost = [], []
        heard: dict[int, dict[str, Any]] = {}
        for slot in topology.live_slots:
            key = f"round/{round_index}/{stage}/slot/{slot}"
            try:
                message = topology.fetch(key, sender=f"slot {slot}", timeout_s=max(0.0, deadline - time.monotonic()))
            except WaitTimeout:
                lost.append(slot)
                continue
            live.append(slot)
            for index, told in message.items():
                heard[int(index)], problems[int(index)], losses[int(index)] = told, told["problem"], told["loss"]
        self.heard = {self.client_ids[index]: heard[index] for index in sorted(heard)}
        everyone = range(len(self.client_ids))
        told = {item["id"] for item in self.excluded}  # why, at an earlier stage of this round
        silent = set()
        for index in everyone:
            if index not in problems:
                slot = index % topology.plan.num_slots
                if slot in lost:
                    limit = self.config.clients.timeout_s
                    problems[index] = f"slot {slot} did not report within clients.timeout_s = {limit:g} s"
                else:
                    problems[index] = f"slot {slot} was dropped in an earlier round"
                    silent |= {self.client_ids[index]} & told
        included = [index for index in everyone if problems[index] is None]
        excluded = [{"id": self.client_ids[i], "reason": str(problems[i])} for i in everyone if problems[i] is not None]
        for reason, clients in by_reason(excluded).items():
            logger.warning("round %d, %s: excluded, because %s: %s", round_index, stage, reason, listed(clients))
        self.excluded += [item for item in excluded if item not in self.excluded and item["id"] not in silent]
        if any(loss is not None for loss in losses) and round_index > 0:
            self.weights = self.next_weights(losses)  # of the model that the last round ended with (dro.evaluate_on)
        weights = self.aggregation_weights()
        total = float(sum(weights[i] for i in included))
        stop = None
        if len(included) < self.config.clients.minimum:
            stop = f"{len(included)} clients gave a valid update, clients.minimum is {self.config.clients.minimum}"
        elif total <= 0:
            stop = "the clients that gave a valid update have weight 0 in p, so there is nothing to average"
        if stop is not None:
            stop += "".join(f"; {listed(clients)}: {reason}" for reason, clients in by_reason(excluded).items())
        if len(included) == len(self.client_ids):
            total = 1.0  # Σ p_i, spared its rounding
        generation = topology.plan.num_slots - len(live)
        decision = Decision(included, total, self.weights.tolist(), excluded, live, generation, stop)
        topology.post(f"round/{round_index}/{stage}/decision", asdict(decision))
        return decision

    def collect(self, round_index: int) -> list[dict[str, Any]]:
        """The round's reports of all live ranks, in rank order. Raises WaitTimeout naming the rank."""
        keys = {rank: f"round/{round_index}/rank/{rank}" for rank in self.topology.live_ranks}
        reports = [self.topology.fetch(key, sender=f"rank {rank}") for rank, key in keys.items()]
        for key in self._stale:
            self.topology.forget(key)
        stages = [f"round/{round_index}/{stage}" for stage in ("stage1", "stage2")]
        self._stale = [*keys.values(), f"round/{round_index}/next"]
        self._stale += [f"{s}/slot/{slot}" for s in stages for slot in self.topology.live_slots] + [
            f"{s}/decision" for s in stages
        ]
        return reports

    def next_weights(self, losses: Sequence[float | None]) -> Vector:
        """Equation (4) over the clients that were evaluated; the weight of a lost client stays with its index, frozen.

        A client without a loss keeps p_i; the others move among themselves on the mass that is left.
        """
        known = [i for i, loss in enumerate(losses) if loss is not None]
        values = [float(losses[i]) for i in known]  # type: ignore[arg-type]
        if len(known) == len(losses):
            return self.strategy.next_weights(self.config, self.weights, values, self.center)
        mass, center_mass = self.weights[known].sum(), self.center[known].sum()
        out = self.weights.copy()
        if mass > 0:
            moved = self.strategy.next_weights(
                self.config, self.weights[known] / mass, values, self.center[known] / center_mass
            )
            out[known] = mass * moved
        return out

    def metrics(self, round_index: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """The round's line of metrics.jsonl, but for the times and the next weights."""
        losses: list[float | None] = [None] * len(self.client_ids)
        skipped: dict[str, Counter[str]] = {client: Counter() for client in self.client_ids}
        val: dict[str, dict[str, float]] = {}
        samples = 0
        for report in reports:
            for index, loss in report["losses"].items():
                losses[int(index)] = loss
            for client, counts in report["skipped"].items():
                skipped[client].update(counts)
            self.positions |= report["positions"]
            val |= report["val"]
            samples += report["samples"]
        known = [loss for loss in losses if loss is not None]
        return {
            "round": round_index,
            "client_ids": self.client_ids,
            "client_weights": self.weights.tolist(),
            "next_client_weights": None,
            "client_losses": losses,
            "mean_loss": float(np.mean(known)) if known else None,
            "worst_loss": max(known) if known else None,
            "excluded_clients": self.excluded,
            "skipped_samples": {client: dict(counts) for client, counts in skipped.items()},
            "samples": samples,
            "bytes_sent_per_rank": max(report["bytes"] for report in reports),
            "peak_memory_bytes": [report["memory"] for report in reports],
            "val": {key: val[key] for key in sorted(val, key=lambda name: (name == "all", name))},
        }

    def state(self, round_index: int) -> dict[str, Any]:
        """What coordinator.json holds."""
        return {
            "round": round_index,
            "client_ids": self.client_ids,
            "next_client_weights": self.weights.tolist(),
            "positions": self.positions,
            "config": self.config.model_dump(mode="json"),
        }


def aggregation_weights(config: Config, p: Vector) -> Vector:
    """Weights of the server's average (ALGORITHM 5), (N,)."""
    return np.full(len(p), 1.0 / len(p)) if config.dro.apply == "loss" else p


def loss_weight(config: Config, p: Vector, index: int) -> float:
    """Factor of client `index`'s whole loss: N p_i where dro.apply says so, else 1 (ALGORITHM 5)."""
    return float(len(p) * p[index]) if config.dro.apply in ("loss", "both") else 1.0
