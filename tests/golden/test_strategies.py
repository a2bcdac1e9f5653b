"""Every strategy against its paper's formulas in plain numpy, on two slots, at ZeRO 0, 2 and 3, with a resume in the middle.

The model and the clients' gradients are those of test_protocol.py, with a term κ/2 ‖w‖² in every loss, so that gradients
change with w = (a, b), (4,). The prediction below knows no ranks, no slices, no torch and no hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import assemble, metrics_of, on_ranks, tree, write_dataset, zero
from numpy.typing import NDArray
from test_protocol import GRADIENTS, trace

Vector = NDArray[np.float64]
CURVATURE, RATE, ROUNDS = 0.5, 0.02, 4
DIRECTIONS = np.array([[*g, *h] for g, h in GRADIENTS.values()])  # (3, 4)
PAIRS = {"north": 16, "south": 24, "west": 16}
SHARES = np.array(list(PAIRS.values())) / sum(PAIRS.values())
LAYOUTS = {"zero0": (2, 1, 0), "zero2": (4, 2, 2), "zero3": (4, 2, 3)}
SCHEDULES = {  # keys; (steps, which elements train)
    "one": ({"schedule__stage1_steps": 0, "schedule__stage2_steps": 3}, [(3, np.ones(4))]),
    "two": (
        {"schedule__stage1_steps": 2, "schedule__stage2_steps": 3, "schedule__stage2_start": "global"},
        [(2, np.array([1.0, 1, 0, 0])), (3, np.ones(4))],
    ),
}


class Plain:
    """FedAvg; the others change one thing each."""

    keys: ClassVar[dict[str, Any]] = {}
    center = SHARES

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def after_step(self, w: Vector, start: Vector, client: int, trains: Vector) -> Vector:
        return w

    def begin(self) -> None:
        pass

    def end(self, w: Vector, start: Vector, client: int, trains: Vector, num_steps: int) -> None:
        pass

    def server(self, old: Vector, mean: Vector, trains: Vector) -> Vector:
        return mean

    def next_p(self, p: Vector, losses: Vector) -> Vector:
        return p


class Prox(Plain):
    keys: ClassVar[dict[str, Any]] = {"mu": 0.8}

    def after_step(self, w: Vector, start: Vector, client: int, trains: Vector) -> Vector:
        return np.where(trains, (w + RATE * 0.8 * start) / (1 + RATE * 0.8), w)


class Momentum(Plain):
    keys: ClassVar[dict[str, Any]] = {"server_momentum": 0.6, "server_lr": 0.9}

    def server(self, old: Vector, mean: Vector, trains: Vector) -> Vector:
        v = self.state.get("v", np.zeros(4))
        self.state["v"] = np.where(trains, 0.6 * v + mean - old, v)
        return np.where(trains, old + 0.9 * self.direction(mean - old), old)

    def direction(self, change: Vector) -> Vector:
        return self.state["v"]


class Nesterov(Momentum):
    def direction(self, change: Vector) -> Vector:
        return change + 0.6 * self.state["v"]


class Adam(Plain):
    keys: ClassVar[dict[str, Any]] = {"server_lr": 0.05, "beta1": 0.8, "beta2": 0.9, "tau": 0.02}

    def server(self, old: Vector, mean: Vector, trains: Vector) -> Vector:
        m, v = self.state.get("m", np.zeros(4)), self.state.get("v", np.full(4, 0.02**2))
        change = mean - old
        self.state["m"] = np.where(trains, 0.8 * m + 0.2 * change, m)
        self.state["v"] = np.where(trains, self.second(v, change**2), v)
        return np.where(trains, old + 0.05 * self.state["m"] / (np.sqrt(self.state["v"]) + 0.02), old)

    def second(self, v: Vector, square: Vector) -> Vector:
        return 0.9 * v + 0.1 * square


class Yogi(Adam):
    def second(self, v: Vector, square: Vector) -> Vector:
        return v - 0.1 * square * np.sign(v - square)


class Controlled(Plain):
    """The paper's algorithm 1 as it stands: the server's c is moved by the clients' changes of c_i."""

    keys: ClassVar[dict[str, Any]] = {"server_lr": 0.9}

    def begin(self) -> None:
        self.of_client = self.state.setdefault("of_client", np.zeros((3, 4)))
        self.of_server = self.state.setdefault("of_server", np.zeros(4))
        self.changes = np.zeros((3, 4))

    def after_step(self, w: Vector, start: Vector, client: int, trains: Vector) -> Vector:
        return w - RATE * trains * (self.of_server - self.of_client[client])

    def end(self, w: Vector, start: Vector, client: int, trains: Vector, num_steps: int) -> None:
        self.changes[client] = trains * (-self.of_server + (start - w) / (num_steps * RATE))

    def server(self, old: Vector, mean: Vector, trains: Vector) -> Vector:
        self.state["of_client"] = self.of_client + self.changes
        self.state["of_server"] = self.of_server + SHARES @ self.changes
        return old + 0.9 * (mean - old)


class Fair(Plain):
    """Algorithm 2 of q-FFL with F_k weighted by c_k, from the second round on."""

    keys: ClassVar[dict[str, Any]] = {"q": 1.5}

    def end(self, w: Vector, start: Vector, client: int, trains: Vector, num_steps: int) -> None:
        self.state.setdefault("models", {})[client] = w

    def server(self, old: Vector, mean: Vector, trains: Vector) -> Vector:
        losses = self.state.get("losses")
        if losses is None:
            return mean
        change = np.array([(old - self.state["models"][k]) / RATE for k in range(3)])
        h = 1.5 * losses**0.5 * np.sum(change**2, axis=1) + losses**1.5 / RATE
        return old - (SHARES * losses**1.5) @ change / (SHARES @ h)

    def next_p(self, p: Vector, losses: Vector) -> Vector:
        self.state["losses"] = losses
        return SHARES * losses**1.5 / (SHARES @ losses**1.5)


class Agnostic(Plain):
    center = np.full(3, 1 / 3)
    keys: ClassVar[dict[str, Any]] = {"step_size": 0.04}

    def next_p(self, p: Vector, losses: Vector) -> Vector:
        return onto_simplex(p + 0.04 * losses)


def onto_simplex(q: Vector) -> Vector:
    """The nearest point of the simplex, by the sort of Held, Wolfe and Crowder."""
    falling = np.sort(q)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(q) + 1)
    return np.maximum(q - excess[falling > excess][-1], 0)


PREDICTIONS: dict[str, type[Plain]] = {
    "fedavg": Plain,
    "fedprox": Prox,
    "fedavgm": Momentum,
    "diloco": Nesterov,
    "fedadam": Adam,
    "fedyogi": Yogi,
    "scaffold": Controlled,
    "qffl": Fair,
    "afl": Agnostic,
}


def predict(
    kind: type[Plain], stages: list[tuple[int, Vector]], present: list[list[int]] | None = None
) -> list[tuple[Vector, Vector]]:
    """(w, p) after each round; present: which clients train in each, None for all."""
    rule, w, p = kind(), np.array([1.0, 2, 3, 4]), kind.center
    out = []
    for number in range(ROUNDS):
        here = [0, 1, 2] if present is None else present[number]
        for num_steps, trains in stages:
            locals_ = []
            rule.begin()
            for client in here:
                x = w
                for _ in range(num_steps):
                    x = x - RATE * trains * (DIRECTIONS[client] + CURVATURE * x)
                    x = rule.after_step(x, w, client, trains)
                rule.end(x, w, client, trains, num_steps)
                locals_.append(x)
            w = rule.server(w, p[here] / p[here].sum() @ np.array(locals_), trains)
        losses = DIRECTIONS @ w + 0.5 * CURVATURE * w @ w
        assert losses.min() > 0, "a negative loss is not believed"
        p = rule.next_p(p, losses)
        out.append((w, p))
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("golden") / "data", PAIRS)


def run(dataset: Path, out: Path, strategy: str, layout: str, schedule: str, **keys: Any) -> dict[str, Any]:
    """Two rounds, and the other two by a new process group that resumes; what is after each round: w, p."""
    world_size, per_slot, stage = LAYOUTS[layout]
    after: dict[tuple[int, str], Any] = {}
    for rounds, first in ((ROUNDS // 2, 0), (ROUNDS, ROUNDS // 2)):
        config = tree(
            dataset, out, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, optimizer__lr=RATE,
            schedule__rounds=rounds, strategy__name=strategy, evaluation__every=0, **SCHEDULES[schedule][0], **keys,
        )  # fmt: skip
        by_rank = on_ranks(trace, world_size, config, CURVATURE, False, timeout=100)
        assert by_rank[0]["first_round"] == first
        for place in by_rank[0]["after"]:
            models = [
                assemble([seen["after"][place] for seen in by_rank[slot : slot + per_slot]])
                for slot in range(0, world_size, per_slot)
            ]
            assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0]), "slots differ"
            after[place] = np.concatenate([models[0]["aligner.w"], models[0]["backbone.w"]])
    lines = metrics_of(out)
    present = [[[*PAIRS].index(name) for name in line.get("present_clients", PAIRS)] for line in lines]
    return {
        "present": present,
        "w": [after[r, "stage2"] for r in range(ROUNDS)],
        "p": [line["next_client_weights"] for line in lines],
    }


ROWS = [(name, layout, schedule) for name in PREDICTIONS for layout in LAYOUTS for schedule in SCHEDULES]
FAST = [ROWS[6 * i + (i + 2) % 6] for i in range(len(PREDICTIONS))]  # each strategy once, each layout and schedule


@pytest.mark.parametrize(
    ("strategy", "layout", "schedule"),
    [row if row in FAST else pytest.param(*row, marks=pytest.mark.slow) for row in ROWS],
)
def test_the_paper_s_formulas(dataset: Path, tmp_path: Path, strategy: str, layout: str, schedule: str) -> None:
    kind = PREDICTIONS[strategy]
    section: Callable[[str], str] = lambda key: "dro" if key == "step_size" else "strategy"
    keys: ClassVar[dict[str, Any]] = {f"{section(key)}__{key}": value for key, value in kind.keys.items()}
    seen = run(dataset, tmp_path, strategy, layout, schedule, **keys)
    for number, (w, p) in enumerate(predict(kind, SCHEDULES[schedule][1])):
        np.testing.assert_allclose(seen["w"][number], w, atol=5e-6, err_msg=f"round {number}")
        np.testing.assert_allclose(seen["p"][number], p, atol=2e-6, err_msg=f"round {number}")


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_clients_that_are_drawn_for_a_round(dataset: Path, tmp_path: Path, strategy: str) -> None:
    """Two of three a round, resumed in the middle: some slot has nobody to train in some round, and waits for the others."""
    kind = PREDICTIONS[strategy]
    keys = {f"strategy__{key}": value for key, value in kind.keys.items()}
    seen = run(dataset, tmp_path, strategy, "zero0", "one", clients__per_round=2, **keys)
    present = seen["present"]
    assert all(len(here) == 2 for here in present)
    assert [0, 2] in present, "both slots had somebody in every round"
    for number, (w, _) in enumerate(predict(kind, SCHEDULES["one"][1], present)):
        np.testing.assert_allclose(seen["w"][number], w, atol=5e-6, err_msg=f"round {number}")
