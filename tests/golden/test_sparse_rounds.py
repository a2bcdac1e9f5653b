"""Rounds whose deltas travel sparse, against plain numpy, on two slots, at ZeRO 0, 2 and 3, with a resume in the middle.

Model, clients and strategies are those of test_strategies.py. Of each block of 2 elements one travels, its sign and its size
in bf16; a peer owns every second chunk of a rank's elements. What a peer has not sent, and what the owner of a chunk has
not passed on, is added to their next deltas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import assemble, on_ranks, tree, write_dataset, zero
from numpy.typing import NDArray
from test_protocol import trace
from test_strategies import CURVATURE, DIRECTIONS, LAYOUTS, PAIRS, RATE, ROUNDS, SCHEDULES, SHARES, Nesterov, Plain

Vector = NDArray[np.float64]
BLOCK, SLOTS = 2, 2
CASES = {  # strategy, schedule, whether stage 2 goes on from the client's own aligner
    "one": (Nesterov, "diloco", SCHEDULES["one"], False),
    "two": (Nesterov, "diloco", SCHEDULES["two"], False),
    "own aligners": (
        Plain,
        "fedavg",
        (SCHEDULES["two"][0] | {"schedule__stage2_start": "client"}, SCHEDULES["two"][1]),
        True,
    ),
}


def sparse_trace(config_tree: dict[str, Any]) -> dict[str, Any]:
    """test_protocol.trace with blocks of 2 elements instead of 4,096."""
    from feddra_ds.federation import server
    from feddra_ds.federation.aggregation.sparse import SparseCodec

    with patch.object(server, "codec_of", lambda *_: SparseCodec(4, 0.5, block_size=BLOCK)):
        return trace(config_tree, CURVATURE, False)


def rounded(value: float) -> float:
    """To bf16, to the nearest, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))


def sent(x: Vector) -> Vector:
    """What arrives of x, (whole blocks,): the larger of each block."""
    out = np.zeros_like(x)
    for start in range(0, len(x), BLOCK):
        at = start + int(np.argmax(np.abs(x[start : start + BLOCK])))
        out[at] = np.sign(x[at]) * rounded(abs(x[at]))
    return out


def summed(deltas: Vector, owed: Vector) -> tuple[Vector, Vector]:
    """(S, n), (S, n) → the sum over the peers (n,) that all hold, and what each still owes (S, n)."""
    n = deltas.shape[1]
    c = -(-n // (SLOTS * BLOCK)) * BLOCK
    v = np.zeros((SLOTS, SLOTS * c))
    v[:, :n] = deltas + owed
    total = np.zeros(SLOTS * c)
    for owner in range(SLOTS):
        chunk = slice(owner * c, (owner + 1) * c)
        for s in range(SLOTS):
            if s != owner:
                arrived = sent(v[s, chunk])
                v[s, chunk] -= arrived
                v[owner, chunk] += arrived
        total[chunk] = sent(v[owner, chunk])
        v[owner, chunk] -= total[chunk]
    return total[:n], v[:, :n]


def predict(case: str, elements: list[list[int]]) -> list[Vector]:
    """w after each round; elements: those that each rank of a slot holds."""
    kind, _, (_, stages), goes_on = CASES[case]
    rule, w, owed = kind(), np.array([1.0, 2, 3, 4]), np.zeros((SLOTS, 4))
    out = []
    for _ in range(ROUNDS):
        locals_: list[Vector | None] = [None] * 3
        owed_at_start = owed.copy()
        for number, (num_steps, trains) in enumerate(stages):
            deltas = np.zeros((SLOTS, 4))
            if number == 1 and goes_on:  # the clients' own aligners hold what stage 1 has kept
                owed = owed_at_start
            for client in range(3):
                own = locals_[client]
                x = own if own is not None and goes_on else w
                for _ in range(num_steps):
                    x = x - RATE * trains * (DIRECTIONS[client] + CURVATURE * x)
                locals_[client] = x
                deltas[client % SLOTS] += SHARES[client] * trains * (x - w)
            mean = w.copy()
            for held in elements:
                active = [i for i in held if trains[i]]
                change, owed[:, active] = summed(deltas[:, active], owed[:, active])
                mean[active] += change
            w = rule.server(w, mean, trains)
        out.append(w)
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("golden") / "data", PAIRS)


FAST = {("own aligners", "zero2")}


@pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(c, n, marks=[] if (c, n) in FAST else pytest.mark.slow) for c in CASES for n in LAYOUTS],
)
def test_rounds_by_hand(dataset: Path, tmp_path: Path, case: str, layout: str) -> None:
    kind, strategy, (schedule, _), _ = CASES[case]
    world_size, per_slot, stage = LAYOUTS[layout]
    keys = {f"strategy__{key}": value for key, value in kind.keys.items()}
    after: dict[tuple[int, str], Vector] = {}
    for rounds in (ROUNDS // 2, ROUNDS):
        config = tree(
            dataset, tmp_path, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, optimizer__lr=RATE,
            schedule__rounds=rounds, strategy__name=strategy, evaluation__every=0, aggregate__precision="int4",
            aggregate__sparsity=0.05, **schedule, **keys,
        )  # fmt: skip
        by_rank = on_ranks(sparse_trace, world_size, config, timeout=100)
        for place in by_rank[0]["after"]:
            models = [
                assemble([seen["after"][place] for seen in by_rank[slot : slot + per_slot]])
                for slot in range(0, world_size, per_slot)
            ]
            assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0]), "slots differ"
            after[place] = np.concatenate([models[0]["aligner.w"], models[0]["backbone.w"]])
    elements = [elements_of(seen["after"][ROUNDS - 1, "stage2"]) for seen in by_rank[:per_slot]]
    assert sorted(i for held in elements for i in held) == [0, 1, 2, 3]
    for number, w in enumerate(predict(case, elements)):
        np.testing.assert_allclose(after[number, "stage2"], w, atol=5e-6, err_msg=f"round {number}")


def elements_of(pieces: list[tuple[str, int, Any]]) -> list[int]:
    """Which elements of w = (a, b) a rank holds, in its order."""
    first = {"aligner.w": 0, "backbone.w": 2}
    return [first[name] + i for name, start, values in pieces for i in range(start, start + len(values))]
