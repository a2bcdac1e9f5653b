"""Rank 0's part of a round: who takes part, the weights p, what is committed. It moves no model data."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feddra_ds.common.errors import WaitTimeout
from feddra_ds.common.logs import logger
from feddra_ds.common.text import by_reason, listed
from feddra_ds.config.schema import Config
from feddra_ds.distributed.topology import Topology
from feddra_ds.federation.aggregation.held import Judgement
from feddra_ds.federation.aggregation.norms import UpdateNorms
from feddra_ds.federation.protocol import ClientReport, Decision, Loss, Next, Protocol, RankReport
from feddra_ds.federation.record import RoundRecord
from feddra_ds.strategies import Strategy, robust_weights
from feddra_ds.strategies.base import Draws
from feddra_ds.strategies.mixture_set import Vector

_FAR = 2.0  # times chance: a loss beyond this is said in the log too


@dataclass
class Coordinator:
    """State of the federation, all of it saved with every checkpoint."""

    config: Config
    topology: Topology
    strategy: Strategy
    client_ids: list[str]
    center: Vector
    mixture: Vector  # p of the round that runs
    draws: Draws = field(init=False)  # of the round that runs; before the first: all clients once
    losses: list[float | None] = field(default_factory=list)  # L_i that were measured last; [] before the first
    loss_scale: float = 1.0  # objective.loss_scale
    chance: float = math.inf  # L_i of a model that knows nothing: no loss beyond it is believed
    positions: dict[str, dict[str, int]] = field(default_factory=dict)
    excluded: list[dict[str, str]] = field(default_factory=list)  # of the round that runs
    clipped: list[dict[str, Any]] = field(default_factory=list)  # losses that were not believed, of the round that runs
    smoothed: Vector | None = None  # what p follows, averaged over the rounds (dro.loss_smoothing); NaN: never heard of
    followed: Vector | None = None  # what p followed when it last moved; NaN where p_i was kept
    not_saved: str | None = None  # why the newest checkpoint that was due could not be written
    norms: UpdateNorms = field(default_factory=lambda: UpdateNorms(None))
    heard: dict[str, ClientReport] = field(default_factory=dict)  # what each client's slot told of the last stage
    cosines: dict[str, float] = field(default_factory=dict)  # of the last stage's updates to each other's (min_cosine)
    _stale: list[str] = field(default_factory=list)  # keys of the last round, read by everyone

    def __post_init__(self) -> None:
        self.draws = np.ones(len(self.client_ids), dtype=np.int64)
        self.protocol = Protocol(self.topology)

    @property
    def present(self) -> list[int]:
        """Indices of the clients that take part in the round that runs."""
        return np.flatnonzero(self.draws).tolist()

    def decide(self, round_index: int, stage: str) -> Decision:
        """Hear every slot (a bounded time, all together), decide who is averaged, and tell all."""
        reports, live, lost = self._hear(round_index, stage)
        self.heard = {self.client_ids[index]: reports[index] for index in sorted(reports)}
        norms = {index: math.sqrt(told.squared_drift) for index, told in reports.items()
                 if told.squared_drift is not None and told.problem is None}  # fmt: skip
        far_off = self.norms.far_off(stage, norms)
        excluded = self._excluded(reports, lost, far_off)
        for reason, clients in by_reason(excluded).items():
            logger.warning("round %d, %s: excluded, because %s: %s", round_index, stage, reason, listed(clients))
        told = {str(index): report.loss for index, report in reports.items()}
        if any(told.values()) and round_index > 0:  # of the model that the last round ended with (dro.evaluate_on)
            self.mixture = self.next_mixture(_means(self._told(told)))
        out = {item["id"] for item in excluded}
        included = [index for index in self.present if self.client_ids[index] not in out]
        weights = robust_weights.never_zero(self.strategy.average_weight(self.mixture, self.draws), self.center)
        # where all take part the sum is 1: nothing is divided by 0.9999999
        total = 1.0 if len(included) == len(weights) else float(sum(weights[i] for i in included))
        decision = Decision(
            included,
            total,
            self.mixture.tolist(),
            excluded,
            live,
            generation=self.topology.plan.num_slots - len(live),
            stop=self._reason_to_stop(included, excluded),
            drift=self._drift(reports, weights, included),
            norm_limit=self._learn_norms(stage, {i: norm for i, norm in norms.items() if i in included}),
            is_used=not far_off or self.config.aggregate.holds_updates,
        )
        if not decision.is_used:
            logger.warning("round %d, %s: the average is not used, as it holds these updates; the clients go on from the global "
                           "model as it was, and later such an update is left out", round_index, stage)  # fmt: skip
        if included and not self.mixture[included].any():
            logger.warning("round %d, %s: the clients that gave a valid update have weight 0 in p; they are averaged with the "
                           "centre's weights", round_index, stage)  # fmt: skip
        self.protocol.tell_decision(round_index, stage, decision)
        return decision

    def _learn_norms(self, stage: str, norms: dict[int, float]) -> float | None:
        """What is told of the norms of the clients that are averaged: the limit of the next average."""
        self.norms.learn(stage, norms)
        return self.norms.limit(stage)

    def _drift(self, reports: dict[int, ClientReport], weights: Vector, included: list[int]) -> float:
        """Strategy.fold_drifts of the clients that are averaged; 0 where it is not asked for, or before the first L_i."""
        total = float(sum(weights[i] for i in included))
        if not self.strategy.folds_drifts or not self.losses or total <= 0:
            return 0.0
        squares = np.array([reports[i].squared_drift for i in included], dtype=np.float64)
        losses = robust_weights.believable(self.losses, self.chance)[included]
        return self.strategy.fold_drifts(weights[included] / total, losses, squares)

    def _hear(self, round_index: int, stage: str) -> tuple[dict[int, ClientReport], list[int], list[int]]:
        """(reports by client index, slots that reported, slots that did not in time)."""
        deadline = time.monotonic() + self.config.clients.timeout_s
        reports: dict[int, ClientReport] = {}
        live, lost = [], []
        for slot in self.topology.live_slots:
            try:
                left = max(0.0, deadline - time.monotonic())
                reports |= self.protocol.hear_stage(round_index, stage, slot, left)
                live.append(slot)
            except WaitTimeout:
                lost.append(slot)
        return reports, live, lost

    def _excluded(
        self, reports: dict[int, ClientReport], lost: Sequence[int], far_off: dict[int, str]
    ) -> list[dict[str, str]]:
        """{id, reason} of every client that is not averaged; also kept for the round's record, each slot's loss once."""
        told = {item["id"] for item in self.excluded}  # why, at an earlier stage of this round
        excluded = []
        for index in self.present:
            client = self.client_ids[index]
            slot = index % self.topology.plan.num_slots
            if index in reports:
                reason = far_off.get(index, reports[index].problem)
            elif slot in lost:
                reason = f"slot {slot} did not report within clients.timeout_s = {self.config.clients.timeout_s:g} s"
            else:
                reason = f"slot {slot} was dropped in an earlier round"
            if reason is not None:
                excluded.append({"id": client, "reason": reason})
                is_news = index in reports or slot in lost or client not in told
                if is_news and excluded[-1] not in self.excluded:
                    self.excluded.append(excluded[-1])
        return excluded

    def note_judgement(self, round_index: int, stage: str, judgement: Judgement) -> None:
        """Who was left out of an average, and by which figure, as its updates were compared; all ranks know it."""
        self.cosines = {self.client_ids[index]: cosine for index, cosine in judgement.cosines.items()}
        for index, reason in judgement.excluded.items():
            told = {"id": self.client_ids[index], "reason": reason}
            logger.warning("round %d, %s: excluded, because %s: %s", round_index, stage, reason, told["id"])
            if told not in self.excluded:
                self.excluded.append(told)

    def note_checkpoint(self, folder: Path, problems: Mapping[str, Sequence[str]]) -> None:
        """A checkpoint was written, or these ranks, by the reason, could not. Called by the thread that writes."""
        if not problems:
            self.not_saved = None
            return
        told = "; ".join(f"{listed(ranks)}: {reason}" for reason, ranks in problems.items())
        self.not_saved = f"no checkpoint could be written to {folder} ({told})"
        logger.warning("%s; those before it are kept", self.not_saved)

    def _reason_to_stop(self, included: list[int], excluded: list[dict[str, str]]) -> str | None:
        if self.not_saved is not None and self.config.checkpoint.on_error == "stop":
            return f"{self.not_saved}, and checkpoint.on_error is stop"
        if len(included) >= self.config.clients.minimum:
            return None
        stop = f"{len(included)} clients gave a valid update, clients.minimum is {self.config.clients.minimum}"
        return stop + "".join(f"; {listed(clients)}: {reason}" for reason, clients in by_reason(excluded).items())

    def next_mixture(self, losses: Sequence[float | None], references: Vector | None = None) -> Vector:
        """Equation (4) over the losses that can be believed; the weight of a client without one stays as it is.

        references: (N,) the losses of the clients' own models, NaN where there is none, for dro.loss = excess.
        """
        self.losses = list(losses)
        self._note_clipped(losses)
        new, keep = self._believed(losses, references), self.config.dro.loss_smoothing
        before = np.full(len(new), np.nan) if self.smoothed is None else self.smoothed
        moved = np.where(np.isnan(before), new, keep * before + (1 - keep) * new)
        self.smoothed = np.where(np.isnan(new), before, moved)
        self.followed = np.where(np.isnan(new), np.nan, self.smoothed)
        return self.strategy.next_mixture(self.mixture, self.loss_scale * self.followed, self.center)

    def _believed(self, losses: Sequence[float | None], references: Vector | None) -> Vector:
        """What of the losses p may follow, (N,), less the references; NaN where there is nothing."""
        believed = robust_weights.believable(losses, self.chance)
        return believed if references is None else believed - references

    def _note_clipped(self, losses: Sequence[float | None]) -> None:
        """Keep for the record, and say in the log where it is far off, each loss that is not believed as it is."""
        used = robust_weights.believable(losses, self.chance)
        self.clipped = []
        for client, loss, value in zip(self.client_ids, losses, used, strict=True):
            if loss is None or loss == value:
                continue
            reported = loss if math.isfinite(loss) else str(loss)
            self.clipped.append({"id": client, "reported": reported, "used": None if np.isnan(value) else float(value)})
            if np.isnan(value) or loss > _FAR * value:  # a little above chance is how a run begins
                logger.warning("the loss that %s reports is not believed: %s", client, reported)

    def _told(self, by_index: Mapping[str, Loss | None]) -> list[Loss | None]:
        """By client, in order, what was told by index."""
        return [by_index.get(str(index)) for index in range(len(self.client_ids))]

    def end_round(self, round_index: int, *, moves_mixture: bool) -> RoundRecord:
        """Hear all ranks, move p where the round's losses do, tell all; the round's record, but for the times."""
        reports = self.protocol.hear_round(round_index)
        for key in self._stale:
            self.topology.forget(key)
        self._stale = self.protocol.keys_of_round(round_index)
        for report in reports:
            self.positions |= report.positions
        losses = self._told({index: loss for report in reports for index, loss in report.losses.items()})
        trained = self._told({index: loss for report in reports for index, loss in report.train_losses.items()})
        # p follows them where there are any, while the record's losses are the new global model's, as of every strategy
        of_snapshot = {index: loss for report in reports for index, loss in report.snapshot_losses.items()}
        moving = self._told(of_snapshot) if of_snapshot else losses
        references = self._references(reports)
        used, self.excluded, excluded = self.mixture, [], self.excluded
        if moves_mixture:
            self.mixture = self.next_mixture(_means(moving), references)
        stops = any(report.asks_to_stop for report in reports)
        self.protocol.tell_next(round_index, Next(self.mixture.tolist(), stops))
        clipped, self.clipped = self.clipped, []
        believed = self._believed(_means(losses), references)
        finite = _finite(_means(losses))
        known = [loss for loss in finite if loss is not None]
        return {
            "round": round_index,
            "client_ids": self.client_ids,
            "client_weights": used.tolist(),
            "next_client_weights": self.mixture.tolist() if moves_mixture else None,
            "client_losses": finite,
            "client_losses_se": _finite(_errors(losses)),
            "client_train_losses": _finite(_means(trained)),
            "client_train_losses_se": _finite(_errors(trained)),
            "reference_losses": [None] * len(self.client_ids) if references is None else _finite(references.tolist()),
            "followed_losses": [] if self.followed is None else _finite(self.followed.tolist()),
            "mean_loss": float(np.mean(known)) if known else None,
            "worst_loss": max(known) if known else None,
            "clipped_losses": clipped,
            "robust_gain": robust_weights.robust_gain(self.mixture, believed, self.strategy.mixture_set(self.center)),
            "excluded_clients": excluded,
            "update_norms": {client: _norm(told.squared_drift) for client, told in self.heard.items()},
            "update_cosines": self.cosines,
            "anchor_gradient_ratio": {client: told.anchor_gradient_ratio for client, told in self.heard.items()},
            "skipped_samples": self._skipped(reports),
            "skipped_steps": {client: steps for report in reports for client, steps in report.skipped_steps.items()},
            "samples": sum(report.samples for report in reports),
            "bytes_sent_per_rank": max(report.bytes for report in reports),
            "peak_memory_bytes": [report.memory for report in reports],
            "stage_bytes_sent": _most(report.stage_bytes for report in reports),
            "stage_memory_bytes": _most(report.stage_memory for report in reports),
            "val": _in_order({name: gallery for report in reports for name, gallery in report.val.items()}),
        }

    def _references(self, reports: Sequence[RankReport]) -> Vector | None:
        """(N,) the losses of the clients' own models, NaN where none was told; None where p does not ask for them."""
        if self.config.dro.loss != "excess":
            return None
        told = {int(index): loss for report in reports for index, loss in report.references.items()}
        return np.array([told.get(i, math.nan) for i in range(len(self.client_ids))])

    def _skipped(self, reports: Sequence[RankReport]) -> dict[str, dict[str, int]]:
        skipped: dict[str, Counter[str]] = {client: Counter() for client in self.client_ids}
        for report in reports:
            for client, counts in report.skipped.items():
                skipped[client].update(counts)
        return {client: dict(counts) for client, counts in skipped.items()}

    def state(self, round_index: int) -> dict[str, Any]:
        """What coordinator.json holds."""
        return {
            "round": round_index,
            "client_ids": self.client_ids,
            "next_client_weights": self.mixture.tolist(),
            "smoothed_losses": None if self.smoothed is None else _finite(self.smoothed.tolist()),
            "positions": self.positions,
            "median_norms": self.norms.medians,
            "config": self.config.model_dump(mode="json"),
        }


def _most(reports: Iterable[dict[str, int]]) -> dict[str, int]:
    """The largest number of each stage."""
    most: dict[str, int] = {}
    for told in reports:
        most |= {stage: max(number, most.get(stage, 0)) for stage, number in told.items()}
    return most


def _in_order(val: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The galleries by name, the pooled one last."""
    return {name: val[name] for name in sorted(val, key=lambda name: (name == "all", name))}


def _means(losses: Sequence[Loss | None]) -> list[float | None]:
    return [None if loss is None else loss.mean for loss in losses]


def _errors(losses: Sequence[Loss | None]) -> list[float | None]:
    return [None if loss is None else loss.error for loss in losses]


def _norm(square: float | None) -> float | None:
    return None if square is None or not math.isfinite(square) else math.sqrt(square)


def _finite(values: Sequence[float | None]) -> list[float | None]:
    """JSON knows no number that is not finite."""
    return [value if value is not None and math.isfinite(value) else None for value in values]
