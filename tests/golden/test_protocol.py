"""Two rounds of the whole protocol with a linear model and fixed gradients; every value is predicted by hand.

The model is θ = a (aligner) and φ = b (backbone), two numbers each, and client i's loss is g_i·a + h_i·b, so that its
gradients are g_i and h_i wherever it stands. Stage 1 takes two steps and stage 2 one, of SGD with lr 0.1:

              g        h          start a = (1, 2), b = (3, 4), p = (1/3, 1/3, 1/3)
    north   (1, 0)   (1, 1)
    south   (0, 1)   (0, 2)       η = 0.1, ρ = 0.02: p stays within √(2ρ/3) = 0.1154701 of the centre
    west    (2, 2)  (−1, 0)

Training losses g_i·a + h_i·b before each step of round 0: 8, 7.9; 10, 9.9; 3, 2.2 in stage 1 and 7.8; 9.8; 1.4 in stage 2.
Round 0, stage 1: a_i = a − 0.2 g_i = (0.8, 2), (1, 1.8), (0.6, 1.6); their mean is a = (0.8, 1.8), b does not move.
Stage 2 goes on from a_i: a_i − 0.1 g_i = (0.7, 2), (1, 1.7), (0.4, 1.4), mean (0.7, 1.7);
b_i = b − 0.1 h_i = (2.9, 3.9), (3, 3.8), (3.1, 4), mean (3, 3.9).
Losses: 0.7 + 6.9 = 7.6; 1.7 + 7.8 = 9.5; 4.8 − 3 = 1.8. exp(0.1 L) = 2.138276, 2.585710, 1.197217, of sum 5.921203:
q = (0.3611219, 0.4366865, 0.2021916), 0.1692698 from the centre, so it is drawn in by 0.6821659:
p = (0.3522898, 0.4038374, 0.2438729).
Round 1, stage 1: a = Σ p_i (a − 0.2 g_i) = (0.7 − 0.2 (p₁ + 2p₃), 1.7 − 0.2 (p₂ + 2p₃)) = (0.5319929, 1.5216834).
Stage 2: west's update is bad. Over north and south, p₁ = 0.4659134 and p₂ = 0.5340866 of their sum 0.7561271:
a = (0.7 − 0.3 p₁, 1.7 − 0.3 p₂) = (0.5602260, 1.5397740), b = (3 − 0.1 p₁, 3.9 − 0.1 p₁ − 0.2 p₂) = (2.9534087, 3.7465913).
Losses: 7.2602260, 9.0329567, 1.2465913; q = (0.3638935, 0.4980461, 0.1380604) → p = (0.3470488, 0.4072567, 0.2456945).
"""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import on_ranks, tree, write_dataset, zero

GRADIENTS = {"north": ((1.0, 0.0), (1.0, 1.0)), "south": ((0.0, 1.0), (0.0, 2.0)), "west": ((2.0, 2.0), (-1.0, 0.0))}
SIDES = (5.0, 10.0)  # second numbers of the embeddings of images and texts
THIRD = 1 / 3
P_1 = [0.3522898, 0.4038374, 0.2438729]
P_2 = [0.3470488, 0.4072567, 0.2456945]
AFTER = {  # the global model after each stage: a, b
    (0, "stage1"): ([0.8, 1.8], [3.0, 4.0]),
    (0, "stage2"): ([0.7, 1.7], [3.0, 3.9]),
    (1, "stage1"): ([0.5319929, 1.5216834], [3.0, 3.9]),
    (1, "stage2"): ([0.5602260, 1.5397740], [2.9534087, 3.7465913]),
}
TRAIN_LOSSES = {"stage1": [7.95, 9.95, 2.6], "stage2": [7.8, 9.8, 1.4]}  # of round 0, means over the steps
LOSSES = {0: [7.6, 9.5, 1.8], 1: [7.2602260, 9.0329567, 1.2465913]}
REASON = "its weights are not finite after the stage"
DECISIONS = [  # (place, clients averaged, Σ of their weights, p, excluded)
    ("round/0/stage1", [0, 1, 2], 1.0, [THIRD] * 3, []),
    ("round/0/stage2", [0, 1, 2], 1.0, [THIRD] * 3, []),
    ("round/1/stage1", [0, 1, 2], 1.0, P_1, []),
    ("round/1/stage2", [0, 1], 0.7561271, P_1, [{"id": "west", "reason": REASON}]),
]


def trace(config_tree: dict[str, Any], curvature: float = 0.0, spoils: bool = True) -> dict[str, Any]:
    """A run whose model, objective, batches and L_i are the mock's; what it decided and averaged, on this rank.

    curvature: κ of a term κ/2 (‖a‖² + ‖b‖²) in every loss; spoils: west's update is bad in round 1, stage 2.
    """
    import torch
    from helpers import Fault, finish, inject, pieces_of
    from torch import nn

    from feddra_ds.config.load import from_dict
    from feddra_ds.federation.protocol import Loss
    from feddra_ds.run import build as build_module
    from feddra_ds.run import rounds as rounds_module
    from feddra_ds.run.build import build

    class Part(nn.Module):
        def __init__(self, start: list[float]):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(start))

        def forward(self, direction: torch.Tensor) -> torch.Tensor:
            return direction @ self.w + 0.5 * curvature * self.w.square().sum()

    class Aligner(Part):
        def forward(self, hidden: Any, with_tokens: bool = False) -> Any:
            """Embeddings of two numbers, the loss and a constant, so that they have a direction."""
            value = super().forward(hidden.direction) + hidden.of_backbone
            return tuple(torch.stack([value, torch.full_like(value, side)], 1) for side in SIDES)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aligner, self.backbone = Aligner([1.0, 2.0]), Part([3.0, 4.0])
            self.config = types.SimpleNamespace(vision_pooling="mean", text_pooling="mean")

        def encoder_with_batchnorm(self) -> None:
            return None

        def decay_parameter_names(self) -> list[str]:
            return []

        def forward(self, pixel_values: Any, freeze_backbone: bool = False, **_: Any) -> Any:
            x = pixel_values.flatten(1)  # (b, 4): g and h
            with torch.set_grad_enabled(not freeze_backbone and torch.is_grad_enabled()):
                of_backbone = self.backbone(x[:, 2:])
            hidden = types.SimpleNamespace(direction=x[:, :2], of_backbone=of_backbone)
            image, text = self.aligner(hidden)
            return types.SimpleNamespace(
                image_embeds=image, text_embeds=text, temperature=1.0, hidden=hidden, learned=None
            )

    class Objective:
        needs_anchors, needs, loss_scale, num_kept, normalises = False, frozenset(), 1.0, 0, True
        options = types.SimpleNamespace(anchor_mode="eval")

        def chance(self, batch_size: int) -> float:
            return math.inf

        def __call__(self, features: Any, anchors: Any, group: Any) -> Any:
            size = 1 if group is None else torch.distributed.get_world_size(group)
            mine = features.image[:, 0].mean() / size  # this rank's additive share
            whole = mine.detach().clone()
            if group is not None:
                torch.distributed.all_reduce(whole, group=group)
            return types.SimpleNamespace(total=mine + (whole - mine).detach())

    def inputs(client_id: str, rows: int) -> Any:
        g, h = GRADIENTS[client_id]
        return torch.tensor([*g, *h]).expand(rows, 4)

    class Batch:
        def __init__(self, client_id: str, rows: int):
            self.pixel_values = inputs(client_id, rows)
            self.input_ids = self.attention_mask = torch.zeros(rows, 1, dtype=torch.int64)
            self.pixels = torch.zeros(rows, 1, dtype=torch.uint8)
            self.text_ids = torch.arange(rows)

        def __len__(self) -> int:
            return len(self.pixel_values)

        def to(self, *_: Any, **__: Any) -> Any:
            return self

        def __getitem__(self, rows: slice) -> Any:
            assert rows == slice(0, len(self))
            return self

    with (
        patch.object(build_module, "model_of", lambda *_: Linear()),
        patch.object(build_module, "build_objective", lambda *_: Objective()),
    ):
        run = build(from_dict(config_tree))
    rows = run.config.data.batch_size // run.topology.plan.ranks_per_slot
    for client in run.clients:
        client.data.batches = lambda _, steps, name=client.id: (Batch(name, rows) for _ in range(steps))

    def loss_of(engine: Any, data: Any, *_: Any) -> Any:
        with torch.no_grad():
            return Loss(float(engine(pixel_values=inputs(data.source.name, 1)).image_embeds[0, 0]), 0.0)

    posted: list[tuple[str, Any]] = []
    after: dict[tuple[int, str], Any] = {}
    post, run_stage, trained = run.topology.post, run.run_stage, run.trainer.run_stage
    fault = Fault("west", "weights", round=1, stage="stage2")
    now: dict[str, Any] = {}

    def listen(key: str, value: Any) -> None:
        posted.append((key, value))
        post(key, value)

    def stage_of_all(number: int, stage: Any) -> int:
        now.update(round=number, stage=stage.name)
        pairs = run_stage(number, stage)
        run.engine.write(run.server.states["global"])
        after[number, stage.name] = pieces_of(run.engine)
        return pairs

    def stage_of_one(client: Any, *args: Any, **kwargs: Any) -> Any:
        hit = (client.id, now["round"], now["stage"]) == (fault.client, fault.round, fault.stage)
        with inject([fault] if hit and spoils else [], run, client):
            return trained(client, *args, **kwargs)

    run.topology.post, run.run_stage, run.trainer.run_stage = listen, stage_of_all, stage_of_one
    run.save_final_model = lambda: None  # two numbers are no model to export
    with patch.object(rounds_module, "measure_loss", loss_of):
        run.rounds()
    finish(run)
    return {"posted": posted, "after": after, "first_round": run.next_round}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("golden") / "data", dict.fromkeys(GRADIENTS, 16))


@pytest.mark.parametrize(
    ("world_size", "per_slot", "stage"),
    [(1, 1, 0), (2, 1, 3), (2, 2, 1), (4, 2, 3), pytest.param(4, 2, 2, marks=pytest.mark.slow)],
)
def test_two_rounds_by_hand(dataset: Path, tmp_path: Path, world_size: int, per_slot: int, stage: int) -> None:
    from helpers import assemble, metrics_of

    config = tree(
        dataset, tmp_path, deepspeed=zero(stage), topology__ranks_per_slot=per_slot, optimizer__lr=0.1,
        schedule__stage1_steps=2, schedule__stage2_steps=1, objective__anchor_weight=0.0, dro__step_size=0.1,
        dro__radius=0.02, evaluation__every=0,
    )  # fmt: skip
    by_rank = on_ranks(trace, world_size, config, timeout=100)

    for slot in range(0, world_size, per_slot):
        for place, (a, b) in AFTER.items():
            model = assemble([seen["after"][place] for seen in by_rank[slot : slot + per_slot]])
            np.testing.assert_allclose(model["aligner.w"], a, atol=2e-6, err_msg=str(place))
            np.testing.assert_allclose(model["backbone.w"], b, atol=2e-6, err_msg=str(place))

    lines = metrics_of(tmp_path)
    for line, p, next_p in zip(lines, ([THIRD] * 3, P_1), (P_1, P_2), strict=True):
        np.testing.assert_allclose(line["client_losses"], LOSSES[line["round"]], atol=5e-6)
        np.testing.assert_allclose(line["client_weights"], p, atol=1e-6)
        np.testing.assert_allclose(line["next_client_weights"], next_p, atol=1e-6)
    assert [line["excluded_clients"] for line in lines] == [[], [{"id": "west", "reason": REASON}]]
    _check_messages(by_rank, world_size, per_slot)


def _check_messages(by_rank: list[dict[str, Any]], world_size: int, per_slot: int) -> None:
    """What each rank told the others, in order: reports of the leaders, decisions of the coordinator, and nothing else."""
    for rank, seen in enumerate(by_rank):
        keys = [key for key, _ in seen["posted"] if key.startswith("round/")]
        expected = []
        for number in (0, 1):
            for stage in ("stage1", "stage2"):
                place = f"round/{number}/{stage}"
                expected += [f"{place}/slot/{rank // per_slot}"] if rank % per_slot == 0 else []
                expected += [f"{place}/decision"] if rank == 0 else []
            expected += [f"round/{number}/rank/{rank}"]
            expected += [f"round/{number}/next"] if rank == 0 else []
        assert keys == expected, f"rank {rank}"
    told = dict(by_rank[0]["posted"])
    for place, included, total, p, excluded in DECISIONS:
        decision = told[f"{place}/decision"]
        assert decision["included"] == included
        assert decision["total_weight"] == pytest.approx(total, abs=1e-6)
        np.testing.assert_allclose(decision["weights"], p, atol=1e-6)
        assert decision["excluded"] == excluded
        assert decision["live_slots"] == list(range(world_size // per_slot))
        assert decision["generation"] == 0
        assert decision["stop"] is None
        assert decision["is_used"]
    for rank, seen in enumerate(by_rank):
        for key, told in seen["posted"]:
            if "/slot/" in key:
                _check_report(key, told, range(rank // per_slot, 3, world_size // per_slot))
        losses = [value["losses"] for key, value in seen["posted"] if key == f"round/0/rank/{rank}"]
        hosted = range(rank // per_slot, 3, world_size // per_slot) if rank % per_slot == 0 else []
        assert [sorted(loss) for loss in losses] == [[str(i) for i in hosted]]


def _check_report(key: str, told: dict[str, Any], hosted: range) -> None:
    """A leader's report of a stage: its clients' problems, and what they trained on."""
    assert list(told) == [str(i) for i in hosted], key
    steps = 2 if "stage1" in key else 1
    for index, about in told.items():
        bad = key.startswith("round/1/stage2") and index == "2"
        assert set(about) == {"problem", "loss", "train_loss", "pairs", "anchor_gradient_ratio", "squared_drift"}
        assert (about["problem"], about["loss"]) == (REASON if bad else None, None), key
        assert about["pairs"] == 8 * steps
        if key.startswith("round/0"):
            expected = TRAIN_LOSSES[key.split("/")[2]][int(index)]
            assert about["train_loss"] == pytest.approx(expected, abs=1e-5), key
