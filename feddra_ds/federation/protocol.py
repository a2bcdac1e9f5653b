"""What the ranks tell each other in a run, every message by name.

Each is a small JSON value under a key of the run's store; no model data travels here. R: round, S: slot, K: rank.

    resume                   coordinator → all     the checkpoint that the run goes on from, or why it cannot
    round/R/STAGE/slot/S     leader → coordinator  a ClientReport for each client of the slot, by its index
    round/R/STAGE/decision   coordinator → all     a Decision
    round/R/STAGE/stop/K     all → coordinator     "I know why the run ends"
    round/R/rank/K           all → coordinator     a RankReport
    round/R/next             coordinator → all     a Next
    saved/R/K                writers → coordinator what the rank wrote of the checkpoint, or why it could not
    saved/R                  coordinator → all     why there is no checkpoint of the run's last round, or null
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from feddra_ds.common.errors import WaitTimeout

if TYPE_CHECKING:  # what a message says is read without torch
    from torch import Tensor

    from feddra_ds.distributed.topology import Topology

COORDINATOR = "the coordinator (rank 0)"
# The coordinator may itself wait clients.timeout_s for another slot after its own training.
PATIENCE = 3


class Loss(NamedTuple):
    """A client's loss L_i: the mean over its pairs, and the standard error of that mean (their SD/√n)."""

    mean: float
    error: float

    @classmethod
    def of(cls, pairs: Tensor) -> Loss:
        """From the losses of the pairs, (n,), n ≥ 2."""
        values = pairs.double()
        return cls(float(values.mean()), float(values.std() / len(values) ** 0.5))


@dataclass(frozen=True)
class ClientReport:
    """What a stage of one client gave."""

    problem: str | None  # why its update cannot be averaged; None: it can
    loss: Loss | None  # L_i of the model that the stage started from, where it was read off the anchors
    train_loss: float | None  # mean of its steps; None: not finite
    pairs: int  # pairs trained on
    anchor_gradient_ratio: float | None = None  # of its last step; None without anchors
    squared_drift: float | None = None  # ‖w_i − w_global‖² of what trained; None where nobody asks


@dataclass(frozen=True)
class Decision:
    """What a stage's average is made of."""

    included: list[int]  # indices of the clients
    total_weight: float  # Σ of their weights in the average
    weights: list[float]  # p, moved by the losses where they came with this stage
    excluded: list[dict[str, str]]  # {id, reason}
    live_slots: list[int]
    generation: int  # grows whenever slots are dropped
    stop: str | None = None  # why the run must end
    drift: float = 0.0  # Strategy.fold_drifts of the clients that are averaged
    norm_limit: float | None = None  # the largest ‖w_i − w_global‖ that the next average of this stage takes
    is_used: bool = (
        True  # whether the average becomes the global model; not where it holds an update that is far too large
    )


class Next(NamedTuple):
    """How the run goes on after a round."""

    weights: list[float]  # p of the next round
    stops: bool  # after this round's checkpoint, as a rank was asked to (run/stop_request.py)


@dataclass(frozen=True)
class RankReport:
    """What a rank tells at the end of a round."""

    losses: dict[str, Loss | None] = field(default_factory=dict)  # L_i by the client's index; at the leader
    train_losses: dict[str, Loss | None] = field(default_factory=dict)  # the same of training pairs, where L_i is not
    snapshot_losses: dict[str, Loss | None] = field(default_factory=dict)  # L_i that p follows instead (Stage.snapshot)
    references: dict[str, float] = field(default_factory=dict)  # L_i of the client's own model, for dro.loss = excess
    positions: dict[str, dict[str, int]] = field(default_factory=dict)  # of each client in its data; at the leader
    val: dict[str, dict[str, float]] = field(default_factory=dict)  # retrieval by gallery
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)  # unreadable samples by client and reason
    skipped_steps: dict[str, dict[str, int]] = field(default_factory=dict)  # by client and stage; at the leader
    samples: int = 0  # pairs trained on; at the leader
    bytes: int = 0  # handed to collectives over the peers
    memory: int = 0  # peak bytes
    stage_bytes: dict[str, int] = field(default_factory=dict)  # handed to collectives, by stage
    stage_memory: dict[str, int] = field(default_factory=dict)  # bytes taken, by stage
    asks_to_stop: bool = False  # after this round


class Protocol:
    """The messages of one rank: `tell_*` publishes, `hear_*` waits a bounded time and raises WaitTimeout with the sender."""

    def __init__(self, topology: Topology):
        self.topology = topology

    # ---- a stage
    def tell_stage(self, round_index: int, stage: str, reports: Mapping[int, ClientReport]) -> None:
        told = {str(index): asdict(report) for index, report in reports.items()}
        self.topology.post(_slot(round_index, stage, self.topology.slot), told)

    def hear_stage(self, round_index: int, stage: str, slot: int, timeout_s: float) -> dict[int, ClientReport]:
        message = self.topology.fetch(_slot(round_index, stage, slot), sender=f"slot {slot}", timeout_s=timeout_s)
        return {int(index): ClientReport(**_with_losses(told, "loss")) for index, told in message.items()}

    def tell_decision(self, round_index: int, stage: str, decision: Decision) -> None:
        self.topology.post(_decision(round_index, stage), asdict(decision))

    def hear_decision(self, round_index: int, stage: str) -> Decision:
        return Decision(**self._patiently(_decision(round_index, stage)))

    def leave(self, round_index: int, stage: str, live_slots: Sequence[int]) -> None:
        """Before the run ends early: rank 0, whose store dies with it, waits (a bounded time) until the others know why."""
        self.topology.leave_after_reading(f"round/{round_index}/{stage}/stop", live_slots)

    # ---- a round
    def tell_round(self, round_index: int, report: RankReport) -> None:
        self.topology.post(_rank(round_index, self.topology.rank), asdict(report))

    def hear_round(self, round_index: int) -> list[RankReport]:
        """The reports of all live ranks, in rank order."""
        return [
            _rank_report(self.topology.fetch(_rank(round_index, rank), sender=f"rank {rank}"))
            for rank in self.topology.live_ranks
        ]

    def tell_next(self, round_index: int, following: Next) -> None:
        self.topology.post(_next(round_index), list(following))

    def hear_next(self, round_index: int) -> Next:
        return Next(*self._patiently(_next(round_index)))

    def keys_of_round(self, round_index: int) -> list[str]:
        """The keys of a round that everybody has read once the next round has ended."""
        topology = self.topology
        keys = [_rank(round_index, rank) for rank in topology.live_ranks] + [_next(round_index)]
        for stage in ("stage1", "stage2"):
            keys += [_slot(round_index, stage, slot) for slot in topology.live_slots]
            keys.append(_decision(round_index, stage))
        return keys

    # ---- a checkpoint
    def tell_saved(self, round_index: int, files: Mapping[str, Any], problem: str | None) -> None:
        self.topology.post(_saved(round_index, self.topology.rank), [files, problem])

    def hear_saved(self, round_index: int, ranks: Iterable[int]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """(what these ranks wrote, together; which ranks could not write, or did not say in time, by the reason)."""
        files: dict[str, Any] = {}
        problems: dict[str, list[str]] = {}
        deadline = time.monotonic() + self.topology.timeout_s
        for rank in ranks:
            left, sender = max(0.0, deadline - time.monotonic()), f"rank {rank}"
            try:
                written, problem = self.topology.fetch(_saved(round_index, rank), sender=sender, timeout_s=left)
            except WaitTimeout:
                written, problem = {}, f"not heard of within clients.timeout_s = {self.topology.timeout_s:g} s"
            self.topology.forget(_saved(round_index, rank))
            files |= written
            if problem is not None:
                problems.setdefault(problem, []).append(sender)
        return files, problems

    def tell_kept(self, round_index: int, not_saved: str | None) -> None:
        self.topology.post(_kept(round_index), not_saved)

    def hear_kept(self, round_index: int) -> str | None:
        """Why there is no checkpoint of the run's last round, or None."""
        not_saved: str | None = self._patiently(_kept(round_index))
        return not_saved

    def _patiently(self, key: str) -> Any:
        return self.topology.fetch(key, sender=COORDINATOR, timeout_s=PATIENCE * self.topology.timeout_s)


def _with_losses(told: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A message with the losses under these keys as such: JSON has made lists of them."""
    return told | {key: None if told[key] is None else Loss(*told[key]) for key in keys}


def _rank_report(told: dict[str, Any]) -> RankReport:
    tables = {key: _with_losses(told[key], *told[key]) for key in ("losses", "train_losses", "snapshot_losses")}
    return RankReport(**(told | tables))


def _slot(round_index: int, stage: str, slot: int) -> str:
    return f"round/{round_index}/{stage}/slot/{slot}"


def _decision(round_index: int, stage: str) -> str:
    return f"round/{round_index}/{stage}/decision"


def _rank(round_index: int, rank: int) -> str:
    return f"round/{round_index}/rank/{rank}"


def _next(round_index: int) -> str:
    return f"round/{round_index}/next"


def _saved(round_index: int, rank: int) -> str:
    return f"saved/{round_index}/{rank}"


def _kept(round_index: int) -> str:
    return f"saved/{round_index}"
