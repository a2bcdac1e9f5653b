"""Whole runs whose deltas travel compressed: the loss, resuming, other layouts, and what rounding keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    finish,
    largest_difference,
    metrics_of,
    on_each,
    on_ranks,
    predicted_bytes,
    run_all,
    tree,
    weights_of,
    zero,
)

from feddra_ds.checkpoint.format import folder_of
from feddra_ds.checkpoint.load import SavedFragments
from feddra_ds.engine.masters import Fragment

ADAMW = {
    "optimizer__name": "adamw",
    "optimizer__lr": 3e-4,
}  # at 1e-3 such small runs are chaotic: any rounding moves them


SPARSE = {"aggregate__precision": "int2", "aggregate__sparsity": 0.05, "strategy__name": "diloco"}
ONE_SYNC = {"aggregate__after_stage1": False}
LORA = {"type": "lora", "r": 4, "alpha": 8, "aggregation": "factors"}


def compressed(dataset: Path, out: Path, precision: str, **changes: Any) -> dict[str, Any]:
    return tree(dataset, out, **{"aggregate__precision": precision, "aggregate__block_size": 64} | changes)


def owed_of(out: Path, round_index: int) -> dict[str, np.ndarray]:
    """What all slots together owed in a checkpoint, by parameter."""
    folder = folder_of(out, round_index)
    slots = sorted(path.name for path in (folder / "residuals").iterdir())
    saved = [SavedFragments(folder, f"residuals/{slot}").parameters() for slot in slots]
    return {name: torch.stack([s[name] for s in saved]).double().sum(0).flatten().numpy() for name in saved[0]}


@pytest.fixture(scope="module")
def losses(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Ten rounds at each precision."""
    changes = {"schedule__rounds": 10, "evaluation__every": 0, "checkpoint__every": 10} | ADAMW
    outs = [tmp_path_factory.mktemp("runs") / precision for precision in ("fp32", "bf16", "int8", "int4")]
    on_each(run_all, [(compressed(dataset, out, out.name, **changes),) for out in outs], world_size=2)
    return {out.name: metrics_of(out) for out in outs}


@pytest.mark.slow
def test_after_ten_rounds_the_loss_is_that_of_fp32(losses: dict[str, list[dict[str, Any]]]) -> None:
    exact = losses["fp32"][-1]["mean_loss"]
    assert exact < 0.8 * losses["fp32"][0]["mean_loss"]  # it learned something to lose
    for precision in ("bf16", "int8", "int4"):
        assert losses[precision][-1]["mean_loss"] == pytest.approx(exact, rel=0.01)
        assert losses[precision][-1]["mean_loss"] != exact


@pytest.mark.slow
def test_after_ten_rounds_sparse_deltas_have_learned_too(dataset: Path, tmp_path: Path) -> None:
    """5 % of the elements a round: slower than fp32, far below the start."""
    changes = {"schedule__rounds": 10, "evaluation__every": 0, "checkpoint__every": 10} | ADAMW
    config = compressed(dataset, tmp_path, "int2", aggregate__sparsity=0.05, **changes)
    on_ranks(run_all, 2, config)
    first, last = (metrics_of(tmp_path)[i]["mean_loss"] for i in (0, -1))
    assert last < 0.9 * first


@pytest.mark.slow
def test_bytes_in_the_metrics(losses: dict[str, list[dict[str, Any]]]) -> None:
    """Scales are per 64 elements here: 1/16 more an element than the 1/64 of the default."""
    exact = losses["fp32"][-1]["bytes_sent_per_rank"]
    for precision, share in (("bf16", 0.51), ("int8", 0.28), ("int4", 0.16)):
        assert 0 < losses[precision][-1]["bytes_sent_per_rank"] <= share * exact


@pytest.mark.parametrize(
    "schedule",
    [{"schedule__stage1_steps": 0}, pytest.param({"schedule__stage2_start": "global"}, marks=pytest.mark.slow)],
)
def test_sparse_deltas_are_two_per_cent_of_fp32(dataset: Path, tmp_path: Path, schedule: dict[str, Any]) -> None:
    """Both measured alike in the metrics, in one stage and in two with anchors, with a Nesterov step on the server."""
    outs = [tmp_path / name for name in ("fp32", "sparse")]
    changes = SPARSE | schedule | {"schedule__rounds": 1, "evaluation__every": 0, "objective__anchor_weight": 1.0}
    trees = [tree(dataset, outs[0], **changes | {"aggregate__precision": "fp32", "aggregate__sparsity": None})]
    on_each(run_all, [(trees[0],), (tree(dataset, outs[1], **changes),)], world_size=2)
    exact, sparse = (metrics_of(out)[0]["bytes_sent_per_rank"] for out in outs)
    assert 0 < sparse <= 0.02 * exact
    assert exact == predicted_bytes(trees[0], 2)
    assert sparse == predicted_bytes(tree(dataset, outs[1], **changes), 2)


@pytest.mark.parametrize(("ranks_per_slot", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_resume_continues_to_the_bit(dataset: Path, tmp_path: Path, ranks_per_slot: int, stage: int) -> None:
    changes = {"schedule__rounds": 3, "deepspeed": zero(stage), "topology__ranks_per_slot": ranks_per_slot} | ADAMW
    whole, cut, ranks = tmp_path / "whole", tmp_path / "cut", 2 * ranks_per_slot
    on_ranks(run_all, ranks, compressed(dataset, whole, "int4", **changes))
    on_ranks(run_all, ranks, compressed(dataset, cut, "int4", **(changes | {"schedule__rounds": 1})))
    assert any(owed.any() for owed in owed_of(cut, 0).values())
    on_ranks(run_all, ranks, compressed(dataset, cut, "int4", **changes))
    assert largest_difference(weights_of(whole, 2), weights_of(cut, 2)) == 0
    assert largest_difference(owed_of(whole, 2), owed_of(cut, 2)) == 0


def owed_when_resumed(config: dict[str, Any]) -> dict[str, Any]:
    """What this rank's server owes after it has read a checkpoint: parameter → [(first element, values)]."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.run.build import build

    run = build(from_dict(config))
    assert run.server.residuals is not None
    out: dict[str, Any] = {}
    for part, state in run.server.residuals.items():
        for fragment, owed in run.engine.views_of(part, state):
            out.setdefault(fragment.name, []).append((fragment.start, owed.double().numpy()))
    finish(run)
    return out


@pytest.mark.slow
def test_another_layout_owes_the_same(dataset: Path, tmp_path: Path) -> None:
    """Saved by 3 slots of one rank at ZeRO 0; read by 1 slot, and by 2 slots of 2 ranks at ZeRO 3."""
    config = compressed(dataset, tmp_path, "int4", schedule__rounds=1, topology__ranks_per_slot=1)
    on_ranks(run_all, 3, config)
    owed = owed_of(tmp_path, 0)
    for ranks, layout in ((1, {}), (4, {"topology__ranks_per_slot": 2, "deepspeed": zero(3)})):
        by_rank = on_ranks(owed_when_resumed, ranks, compressed(dataset, tmp_path, "int4", **layout))
        found = {name: np.zeros(values.size) for name, values in owed.items()}
        for told in by_rank:
            for name, pieces in told.items():
                for start, values in pieces:
                    found[name][start : start + values.size] += values
        assert largest_difference(owed, found) < 1e-9


def test_one_slot_sends_nothing_and_rounds_nothing(dataset: Path, tmp_path: Path) -> None:
    outs = [tmp_path / precision for precision in ("fp32", "int4")]
    on_each(run_all, [(compressed(dataset, out, out.name),) for out in outs])
    assert largest_difference(*(weights_of(out, 1) for out in outs)) == 0
    assert metrics_of(outs[1])[0]["bytes_sent_per_rank"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ONE_SYNC,
        {"aggregate__sparsity": 0.05},
        pytest.param({"aggregate__sparsity": 0.05, "clients__per_round": 2} | ONE_SYNC, marks=pytest.mark.slow),
        pytest.param({"aggregate__sparsity": 0.05, "model__adapter": LORA}, marks=pytest.mark.slow),
        pytest.param({"aggregate__sparsity": 0.05, "deepspeed": zero(3, bf16=True)}, marks=pytest.mark.slow),
    ],
    ids=["int4", "one sync", "sparse", "sparse, drawn clients", "sparse, LoRA", "sparse, bf16 at ZeRO 3"],
)
def test_model_and_residuals_together_are_the_exact_model(
    dataset: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """After one round without anchors clients have trained as at fp32, so only what is owed tells the models apart.

    In stage 2 the clients go on with their own aligners, which must not count stage 1's rounding twice.
    """
    outs = [tmp_path / precision for precision in ("fp32", "int4")]
    changes = changes | {"schedule__rounds": 1, "objective__anchor_weight": 0.0}
    exactly = changes | {"aggregate__sparsity": None}
    trees = [compressed(dataset, out, out.name, **how) for out, how in zip(outs, (exactly, changes), strict=True)]
    on_each(run_all, [(one,) for one in trees], world_size=2)
    exact, rounded = (weights_of(out, 0) for out in outs)
    owed = owed_of(outs[1], 0)
    assert largest_difference(exact, rounded) > 1e-5
    assert largest_difference(exact, {name: rounded[name] + owed[name] for name in rounded}) < 1e-6


def settle(config: dict[str, Any]) -> dict[str, float]:
    """A round by hand on one slot which owes 0.5 of everything: the clients' weights do not move, one is left out."""
    from feddra_ds.checkpoint.format import SHARED
    from feddra_ds.config.load import from_dict
    from feddra_ds.federation.schedule import stages_of_round
    from feddra_ds.run.build import build

    run = build(from_dict(config))
    server, engine = run.server, run.engine
    assert server.residuals is not None
    for state in server.residuals.values():
        for owed in state:
            owed.fill_(0.5)
    before = {part: [s.clone() for s in state] for part, state in server.states[SHARED].items()}
    for stage in stages_of_round(run.config, 0):
        server.begin(stage)
        for client in run.clients[:2]:
            server.add(client, 0.25, before)
        server.finish(run.topology, 0.5)
    after = server.states[SHARED]
    out = {
        part: max(float((a - b - 0.5).abs().max()) for a, b in zip(after[part], before[part], strict=True))
        for part in ("aligner", "backbone")
    }
    out["owed"] = max(float(owed.abs().max()) for state in server.residuals.values() for owed in state)
    out["sum"] = sum(float(v.sum()) for _, v in engine.views_of("aligner", after["aligner"]))
    finish(run)
    return out


def test_what_was_owed_is_paid_once_a_round(dataset: Path, tmp_path: Path) -> None:
    ((found,),) = on_each(settle, [(compressed(dataset, tmp_path, "int8"),)])
    assert found["aligner"] < 1e-6
    assert found["backbone"] < 1e-6
    assert found["owed"] == 0


def test_a_checkpoint_lists_what_belongs_to_it(dataset: Path, tmp_path: Path) -> None:
    """Files of a write that was cut off, at another layout, lie in the same folder; they are not read."""
    on_ranks(run_all, 2, compressed(dataset, tmp_path, "int8", schedule__rounds=1))
    folder = folder_of(tmp_path, 0)
    (folder / "residuals" / "slot-00000" / "shard-00007-of-00009.safetensors").write_bytes(b"cut off")
    saved = SavedFragments(folder, "residuals/slot-00000")
    name, shape = next(iter(saved.shapes.items()))
    assert saved.read(Fragment(name, 0, int(torch.Size(shape).numel()), 0)).isfinite().all()
