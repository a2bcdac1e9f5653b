"""Bad clients on real slots: held updates, sharded, against plain NumPy over whole rows; who is excluded and named."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import (
    Fault,
    metrics_of,
    on_ranks,
    predicted_bytes,
    same_bits,
    tree,
    watched,
    weights_of,
    write_dataset,
    zero,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _attacks import ATTACKS, poison, rows_of

NUM, BAD = 7, (2, 5)  # clients, and which of them are bad: one on each of two slots
WEIGHTS = [0.25, 0.1875, 0.125, 0.0625, 0.125, 0.125, 0.125]
RULES: dict[str, dict[str, Any]] = {
    "cosine": {"min_cosine": 0.1},
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean", "trim": 0.25},
    "krum": {"rule": "krum", "num_bad": 2},
}


def honest(client: int | str, name: str, size: int, start: int, length: int) -> np.ndarray:
    """Of a fragment of a parameter, whatever the layout: noise of one's own, or what all have in common."""
    draw = np.random.default_rng(zlib.crc32(f"{client}/{name}".encode()))
    return draw.normal(size=size)[start : start + length]


def settled_by_hand(rows: np.ndarray, weights: np.ndarray, rule: dict[str, Any]) -> np.ndarray:
    """(n, D) float64 rows of those that were not excluded → (D,)."""
    if "rule" not in rule or rule["rule"] == "krum":
        return weights @ rows / weights.sum()
    order = rows.argsort(axis=0, kind="stable")
    ordered, w = np.take_along_axis(rows, order, 0), weights[order]
    if rule["rule"] == "trimmed_mean":
        kept = slice(2, len(rows) - 2)  # ⌈0.25 · 7⌉ at each end
        return (ordered[kept] * w[kept]).sum(0) / w[kept].sum(0)
    up_to = w.cumsum(0)
    low, high = (up_to < 0.5 - 1e-9).sum(0), (up_to < 0.5 + 1e-9).sum(0)
    return (np.take_along_axis(ordered, low[None], 0) + np.take_along_axis(ordered, high[None], 0))[0] / 2


def attack_all(config: dict[str, Any], stage_index: int) -> dict[str, Any]:
    """On a real engine and its groups: each attack under each rule, with updates drawn by hand."""
    import torch
    from helpers import build_run, finish

    from feddra_ds.checkpoint.format import SHARED
    from feddra_ds.config.schema import AggregateConfig
    from feddra_ds.federation.aggregation import exchange
    from feddra_ds.federation.aggregation.held import HeldUpdates, elements
    from feddra_ds.federation.schedule import stages_of_round

    run = build_run(config)
    engine, topology, base = run.engine, run.topology, run.server.states[SHARED]
    stage = stages_of_round(run.config, 0)[stage_index]
    states = {}
    for client in range(topology.slot, NUM, topology.plan.num_slots):
        state = states[client] = {part: [x.clone() for x in base[part]] for part in (*stage.parts, "buffers")}
        for part in stage.parts:
            for fragment, values in engine.views_of(part, state[part]):
                size = int(np.prod(engine.shapes[fragment.name]))
                where = fragment.name, size, fragment.start, fragment.length
                update = 0.01 * (honest("all", *where) + 0.6 * honest(client, *where))
                values += torch.from_numpy(update).float()
        for buffer in state["buffers"]:
            buffer += 0.01 * (client + 1) if buffer.is_floating_point() else 10 * (client + 1)
    out: dict[str, Any] = {}
    share = topology.slot_rank if engine.zero_stage > 0 else 0  # which this rank holds
    rests = {part: engine.holds(part, None) for part in stage.parts}
    whole = lambda state: torch.cat(list(elements(engine, (*stage.parts, "buffers"), state, rests))).double().numpy()
    for attack in ATTACKS:
        old: dict[int, Any] = {}
        for index in BAD:  # of another round: what was common then is not now
            length = len(whole(base))
            old[index] = torch.from_numpy(whole(base)).float() + 0.01 * torch.from_numpy(
                honest(f"old {index}", str(share), length, 0, length)).float()  # fmt: skip
        for name, rule in RULES.items():
            held = HeldUpdates(AggregateConfig(**rule), engine, stage.parts, base)
            for client, state in states.items():
                held.add(WEIGHTS[client], state, client)
            poison(held, topology, attack, BAD, old, seed=share)
            indices, rows = rows_of(held, topology)
            rows = rows[np.argsort(indices)].double().numpy()
            with patch.dict(exchange.BLOCK_ELEMENTS, cpu=7 * 1000 + 3):  # several chunks, the last not full
                held.compare(topology, range(NUM))
                judged = held.judge(topology, range(NUM), 1.0)
                new = held.average(topology, judged.total_weight)
                again = held.average(topology, judged.total_weight)
            left = judged.included
            expected = settled_by_hand(rows[left], np.array(WEIGHTS)[left], rule)
            good = rows[[i for i in range(NUM) if i not in BAD]]
            found = whole(new)
            fewer = held.judge(topology, range(1, NUM), 0.75)  # as where a slot is lost in the average
            out[attack, name] = {
                "fewer": fewer.included,
                "excluded": judged.excluded,
                "cosines": judged.cosines,
                "total": judged.total_weight,
                "error": float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max()),
                "outside": float(np.maximum(good.min(0) - found, found - good.max(0)).max()),
                "far": float(np.linalg.norm(found - good.mean(0)) / np.linalg.norm(good.mean(0) - whole(base))),
                "same again": all(torch.equal(a, b) for part in new for a, b in zip(new[part], again[part], strict=True)),
                "integers": [int(b) for b in new["buffers"] if not b.is_floating_point()],
                "bytes": held.num_bytes,
            }  # fmt: skip
    # only clients of the first slot are left: the others have nothing to send
    left = [0, 2, 4] if topology.plan.num_slots == 2 else [0, 1, 4]
    for name, rule in RULES.items():
        held = HeldUpdates(AggregateConfig(**rule | {"num_bad": 1}), engine, stage.parts, base)
        for client, state in states.items():
            held.add(WEIGHTS[client], state, client)
        held.compare(topology, left)
        judged = held.judge(topology, left, sum(WEIGHTS[i] for i in left))
        out["few", name] = (
            len(judged.included),
            bool(np.isfinite(whole(held.average(topology, judged.total_weight))).all()),
        )
    finish(run)
    return out


# elsewhere both of the bad ones are excluded, and nobody else
SLIPS_THROUGH = {("ALIE", "cosine"), ("1,000 ×", "cosine"), ("ALIE", "krum")}  # as their papers say


@pytest.mark.parametrize(
    ("world_size", "per_slot", "stage", "part"),
    [
        pytest.param(2, 1, 0, 0, id="2 slots, aligner"),
        pytest.param(4, 2, 2, 1, id="2x2, whole model", marks=pytest.mark.exhaustive),
        pytest.param(4, 2, 3, 0, id="2x2, ZeRO 3", marks=pytest.mark.slow),
        pytest.param(2, 2, 0, 0, id="1 slot of 2, ZeRO 0", marks=pytest.mark.exhaustive),
    ],
)
def test_attacks(dataset: Path, tmp_path: Path, world_size: int, per_slot: int, stage: int, part: int) -> None:
    norm = {"model__head__norm": "batchnorm"} if per_slot == 1 else {}  # over ranks it needs CUDA
    config = tree(dataset, tmp_path, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, **norm)
    by_rank = on_ranks(attack_all, world_size, config, part)
    for rank in by_rank:
        assert {rule: rank.pop(("few", rule)) for rule in RULES} == {
            rule: (3 - (rule == "krum"), True) for rule in RULES
        }
    for (attack, rule), found in by_rank[0].items():
        case = f"{attack} under {rule}"
        for other in by_rank[1:]:
            assert other[attack, rule]["excluded"] == found["excluded"], case
            assert other[attack, rule]["cosines"] == found["cosines"], f"{case}: to the bit"
        assert max(rank[attack, rule]["error"] for rank in by_rank) <= 1e-6, case
        assert all(rank[attack, rule]["same again"] for rank in by_rank), case
        assert set(found["integers"]) <= {10}, f"{case}: the first client's counters"
        if rule != "krum":  # which leaves out the same number of them
            assert found["fewer"] == [i for i in range(1, NUM) if i not in found["excluded"]], case
        if rule in ("median", "trimmed_mean"):
            assert found["excluded"] == {}, case
            assert max(rank[attack, rule]["outside"] for rank in by_rank) <= 1e-6, f"{case}: between the good ones'"
        elif (attack, rule) not in SLIPS_THROUGH:
            assert set(found["excluded"]) == set(BAD), case
            assert found["total"] == pytest.approx(1 - sum(WEIGHTS[i] for i in BAD))
            figure = "Krum score" if rule == "krum" else "cosine to the others'"
            assert all(figure in reason for reason in found["excluded"].values())
        else:
            assert not set(found["excluded"]) & set(BAD), f"{case}: docs/poisoning.md says so"
        if (attack, rule) != ("1,000 ×", "cosine"):  # which goes in their direction, and which the norm check finds
            assert found["far"] < 0.6, f"{case}: bounded"


def test_whom_updates_give_away_is_named_and_the_average_is_that_of_the_others(tmp_path: Path) -> None:
    """A real round on two slots, in which one client's weights are 1,000 times too large, against a round in which they
    are not finite, so that its slot leaves them out."""
    clients = dict.fromkeys(("a", "b", "c", "d", "e"), 16)
    root = write_dataset(tmp_path / "data", clients)
    settings = {
        "schedule__rounds": 1,
        "schedule__stage1_steps": 0,
        "evaluation__every": 0,
        "aggregate__max_norm_ratio": None,
    }
    rules: dict[str, dict[str, Any]] = {
        "far": {"aggregate__rule": "krum", "aggregate__min_cosine": -1.0}, "weights": {"aggregate__rule": "mean"},
    }  # fmt: skip
    for kind, rule in rules.items():
        config = tree(root, tmp_path / kind, deepspeed=zero(2), **settings, **rule)
        on_ranks(watched, 2, config, [Fault("d", kind)])
        assert metrics_of(tmp_path / kind)[0]["bytes_sent_per_rank"] == predicted_bytes(config, 2, len(clients))
    (line,) = metrics_of(tmp_path / "far")
    (excluded,) = line["excluded_clients"]
    assert excluded["id"] == "d"
    assert "Krum score" in excluded["reason"]
    assert line["update_cosines"].keys() == clients.keys()
    assert metrics_of(tmp_path / "weights")[0]["update_cosines"] == {}
    assert same_bits(weights_of(tmp_path / "far", 0), weights_of(tmp_path / "weights", 0))
