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
from helpers import assemble, metrics_of, on_ranks, tree, weights_of, write_dataset, zero
from numpy.typing import NDArray
from test_protocol import GRADIENTS, SIDES, trace

from feddra_ds.config.load import from_dict
from feddra_ds.federation.schedule import stages_of_round

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

    def added_gradient(self, w: Vector, start: Vector, client: int) -> Vector:
        return np.zeros(4)

    def after_step(self, w: Vector, start: Vector, client: int, trains: Vector) -> Vector:
        return w

    def weights(self, p: Vector, here: list[int]) -> Vector:
        return p[here] / p[here].sum()

    def looked_at(self, w: Vector, snapshot: Vector) -> Vector:
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


class Contrast(Plain):
    """The paper's term by the chain rule, over the one number of the embeddings that is not constant."""

    keys: ClassVar[dict[str, Any]] = {"mu": 5.0, "temperature": 0.1}

    def added_gradient(self, w: Vector, start: Vector, client: int) -> Vector:
        previous = self.state.get("previous", {}).get(client, start)
        x, near, far = (value_of(client, at) for at in (w, start, previous))
        slope = 0.0
        for side in SIDES:
            cosine = lambda y, s=side: (x * y + s * s) / np.hypot(x, s) / np.hypot(y, s)
            change = lambda y, s=side: s * s * (y - x) / np.hypot(x, s) ** 3 / np.hypot(y, s)  # of cosine by x
            of_far = 1 / (1 + np.exp((cosine(near) - cosine(far)) / 0.1))  # share of the previous model
            slope += 5.0 * of_far * (change(far) - change(near)) / 0.1
        return slope * (DIRECTIONS[client] + CURVATURE * w)

    def end(self, w: Vector, start: Vector, client: int, trains: Vector, num_steps: int) -> None:
        if trains.all():  # the round's last stage
            self.state.setdefault("previous", {})[client] = w


def value_of(client: int, w: Vector) -> float:
    return float(DIRECTIONS[client] @ w + 0.5 * CURVATURE * w @ w)


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


class Drawn(Agnostic):
    """Algorithm 1 of the paper, with the losses of all clients at the snapshot."""

    keys: ClassVar[dict[str, Any]] = {"step_size": 0.1}

    def weights(self, p: Vector, here: list[int]) -> Vector:
        return np.full(len(here), 1 / len(here))  # one drawn twice is there twice

    def looked_at(self, w: Vector, snapshot: Vector) -> Vector:
        return snapshot

    def next_p(self, p: Vector, losses: Vector) -> Vector:
        return onto_simplex(p + 0.1 * losses)


def onto_simplex(q: Vector) -> Vector:
    """The nearest point of the simplex, by the sort of Held, Wolfe and Crowder."""
    falling = np.sort(q)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(q) + 1)
    return np.maximum(q - excess[falling > excess][-1], 0)


PREDICTIONS: dict[str, type[Plain]] = {
    "fedavg": Plain,
    "fedprox": Prox,
    "moon": Contrast,
    "fedavgm": Momentum,
    "diloco": Nesterov,
    "fedadam": Adam,
    "fedyogi": Yogi,
    "scaffold": Controlled,
    "qffl": Fair,
    "afl": Agnostic,
    "drfa": Drawn,
}


def predict(
    kind: type[Plain],
    stages: list[tuple[int, Vector]],
    present: list[list[int]] | None = None,
    snapshots: list[int] | None = None,
) -> list[tuple[Vector, Vector]]:
    """(w, p) after each round; present: which clients train in each, None for all; snapshots: after which step of the
    round the clients are looked at too, None for its last."""
    rule, w, p = kind(), np.array([1.0, 2, 3, 4]), kind.center
    out = []
    for number in range(ROUNDS):
        here = [0, 1, 2] if present is None else present[number]
        looked_after = sum(steps for steps, _ in stages) if snapshots is None else snapshots[number]
        for num_steps, trains in stages:
            locals_, seen = [], []
            rule.begin()
            for client in here:
                x = w
                for step in range(num_steps):
                    gradient = DIRECTIONS[client] + CURVATURE * x + rule.added_gradient(x, w, client)
                    x = rule.after_step(x - RATE * trains * gradient, w, client, trains)
                    if step + 1 == looked_after:
                        seen.append(x)
                rule.end(x, w, client, trains, num_steps)
                locals_.append(x)
            looked_after -= num_steps
            if seen:
                snapshot = rule.weights(p, here) @ np.array(seen)
            w = rule.server(w, rule.weights(p, here) @ np.array(locals_), trains)
        losses = np.array([value_of(client, rule.looked_at(w, snapshot)) for client in range(3)])
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
    config: dict[str, Any] = {}
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
        "snapshots": [snapshot_of(config, number) for number in range(ROUNDS)],
        "w": [after[r, "stage2"] for r in range(ROUNDS)],
        "p": [line["next_client_weights"] for line in lines],
    }


def snapshot_of(config: dict[str, Any], number: int) -> int:
    """After how many steps of a round a strategy that takes snapshots does."""
    passed = 0
    for stage in stages_of_round(from_dict(config), number, takes_snapshot=True):
        if stage.snapshot is not None:
            return passed + stage.snapshot
        passed += stage.num_steps
    raise AssertionError("no snapshot")


CELLS = [("zero0", "one"), ("zero0", "two"), ("zero2", "one"), ("zero3", "two")]
ROWS = [(name, *cell) for name in PREDICTIONS for cell in CELLS]
FAST = {  # each strategy once, each layout and schedule
    **{name: ("zero0", ("one", "two")[i % 2]) for i, name in enumerate(PREDICTIONS)},
    "fedavg": ("zero2", "one"),
    "fedavgm": ("zero3", "two"),
}


SHARDED = {
    name: (("zero3", "two"), ("zero2", "one"))[i % 2] for i, name in enumerate(PREDICTIONS)
}  # each strategy once


def _tier(name: str, *cell: str) -> list[pytest.MarkDecorator]:
    if cell == FAST[name]:
        return []
    return [pytest.mark.slow if cell == SHARDED[name] else pytest.mark.exhaustive]


@pytest.mark.parametrize(("strategy", "layout", "schedule"), [pytest.param(*row, marks=_tier(*row)) for row in ROWS])
def test_the_paper_s_formulas(dataset: Path, tmp_path: Path, strategy: str, layout: str, schedule: str) -> None:
    kind = PREDICTIONS[strategy]
    section: Callable[[str], str] = lambda key: "dro" if key == "step_size" else "strategy"
    keys: ClassVar[dict[str, Any]] = {f"{section(key)}__{key}": value for key, value in kind.keys.items()}
    seen = run(dataset, tmp_path, strategy, layout, schedule, **keys)
    for number, (w, p) in enumerate(predict(kind, SCHEDULES[schedule][1], seen["present"], seen["snapshots"])):
        np.testing.assert_allclose(seen["w"][number], w, atol=5e-6, err_msg=f"round {number}")
        np.testing.assert_allclose(seen["p"][number], p, atol=2e-6, err_msg=f"round {number}")


def test_the_average_over_rounds(dataset: Path, tmp_path: Path) -> None:
    """Of the global models after rounds 0 to t, weighted as β^(t − k), on two slots of two ranks, resumed in the middle."""
    run(dataset, tmp_path, "fedavg", "zero3", "two", aggregate__ema=0.7)
    models = [w for w, _ in predict(Plain, SCHEDULES["two"][1])]
    for last in range(ROUNDS):
        shares = 0.7 ** np.arange(last, -1, -1)
        saved = weights_of(tmp_path, last, "ema")
        found = np.concatenate([saved["aligner.w"], saved["backbone.w"]])
        np.testing.assert_allclose(found, shares / shares.sum() @ np.array(models[: last + 1]), atol=5e-6)


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
