"""Micro-batches: the gradient is the whole batch's, and what waits for the backward pass is one micro-batch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import assemble, build_run, finish, largest_difference, on_ranks, pieces_of, tree, zero

BATCH_SIZE, NUM_MICRO_BATCHES = 16, 8


class Saved:
    """Bytes that autograd keeps for the backward pass, weights left out; `peak`: the most at a time."""

    def __init__(self, model: Any):
        self.model, self.held, self.peak = model, 0, 0

    def __enter__(self) -> Saved:
        import torch

        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: Kept(self, x), lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def add(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)


class Kept:
    def __init__(self, saved: Saved, tensor: Any):
        weights = {p.untyped_storage().data_ptr() for p in saved.model.parameters()}  # ZeRO 3 moves them
        own = tensor.untyped_storage().data_ptr() not in weights
        self.saved, self.tensor, self.num_bytes = saved, tensor, own * tensor.numel() * tensor.element_size()
        saved.add(self.num_bytes)

    def __del__(self) -> None:
        self.saved.add(-self.num_bytes)


def one_step(config_tree: dict[str, Any], reports: int | None = None) -> dict[str, Any]:
    """The masters before and after a step of SGD at lr 1, so that they differ by the gradient, and its saved bytes.

    reports: how many different ones the batch has, or as many as there are.
    alone: the saved bytes of a batch of the first 1/NUM_MICRO_BATCHES of the rows, whose update is undone. dtypes: of the
    embeddings that the loss has got, and of those that are kept to look at.
    """
    run = build_run(config_tree)
    engine, client = run.engine, run.clients[0]
    (batch,) = client.data.batches(client.position, 1)
    if reports is not None:
        batch = replace(batch, text_ids=batch.text_ids.abs() % reports)
    engine.train()
    engine.set_learning_rates({"aligner": 1.0, "backbone": 1.0})
    start = {part: engine.snapshot(part) for part in ("aligner", "backbone")}

    def saved_by(rows: Any) -> int:
        with Saved(engine.module) as saved:
            run.trainer.step(rows, lambda *_: None, train_backbone=True, weight=1.0)
        return saved.peak

    dtypes, loss = [], run.trainer.step._loss

    def watched(features: Any, anchors: Any) -> Any:
        dtypes.append(str(features.image.dtype))
        return loss(features, anchors)

    run.trainer.step._loss = watched
    out: dict[str, Any] = {"before": pieces_of(engine)}
    if config_tree["data"]["micro_batch_size"] is None:
        out["alone"] = saved_by(batch[: len(batch) // NUM_MICRO_BATCHES])
        engine.write(start)
    out["peak"], out["after"] = saved_by(batch), pieces_of(engine)
    out["dtypes"] = (dtypes[-1], str(run.trainer.step.last_features.image.dtype))
    finish(run)
    return out


@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 0), (2, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_eight_micro_batches_are_the_whole_batch(dataset: Path, tmp_path: Path, num_ranks: int, stage: int) -> None:
    def step(micro_batch_size: int | None) -> list[dict[str, Any]]:
        config = tree(
            dataset, tmp_path / str(micro_batch_size), deepspeed=zero(stage), topology__ranks_per_slot=num_ranks,
            data__batch_size=BATCH_SIZE, data__micro_batch_size=micro_batch_size, objective__anchor_weight=0.0,
        )  # fmt: skip
        return on_ranks(one_step, num_ranks, config)

    whole, cached = step(None), step(BATCH_SIZE // num_ranks // NUM_MICRO_BATCHES)
    before, after = (assemble([rank[key] for rank in whole]) for key in ("before", "after"))
    assert largest_difference(before, after) > 0.1  # of which the micro-batches' rounding is 1e-4
    assert largest_difference(after, assemble([rank["after"] for rank in cached])) <= 1e-5
    for plain, split in zip(whole, cached, strict=True):
        assert split["peak"] <= 1.3 * plain["alone"]
        assert plain["peak"] > 4 * split["peak"]


def test_pairs_with_the_same_report_know_no_ranks_and_no_micro_batches(dataset: Path, tmp_path: Path) -> None:
    def step(num_ranks: int, micro_batch_size: int | None, **objective: str) -> Any:
        config = tree(
            dataset, tmp_path, topology__ranks_per_slot=num_ranks, objective__anchor_weight=0.0,
            data__batch_size=BATCH_SIZE, data__micro_batch_size=micro_batch_size,
            **{f"objective__{key}": value for key, value in objective.items()},
        )  # fmt: skip
        return assemble([rank["after"] for rank in on_ranks(one_step, num_ranks, config, 5)])

    plain = step(1, None, duplicates="positive", impl="reference")
    assert largest_difference(plain, step(1, None)) > 1e-2  # the batch has such pairs
    for num_ranks, micro_batch_size in ((1, None), (2, None), (2, 2)):
        assert largest_difference(plain, step(num_ranks, micro_batch_size, duplicates="positive")) <= 1e-5


@pytest.mark.slow
def test_bf16_products_give_the_loss_what_the_heads_give(dataset: Path, tmp_path: Path) -> None:
    def step(bf16_products: bool, num_ranks: int, micro_batch_size: int | None) -> tuple[Any, Any, Any]:
        config = tree(
            dataset, tmp_path, deepspeed=zero(1, bf16=True), topology__ranks_per_slot=num_ranks,
            data__batch_size=BATCH_SIZE, data__micro_batch_size=micro_batch_size,
            objective__bf16_products=bf16_products, objective__anchor_weight=0.0,
        )  # fmt: skip
        ranks = on_ranks(one_step, num_ranks, config)
        return assemble([r["before"] for r in ranks]), assemble([r["after"] for r in ranks]), ranks[0]["dtypes"]

    before, plain, dtypes = step(False, 1, None)
    assert dtypes == ("torch.float32", "torch.float32")
    moved = largest_difference(before, plain)
    for num_ranks, micro_batch_size in ((1, None), (2, 3)):
        _, after, dtypes = step(True, num_ranks, micro_batch_size)
        assert dtypes == ("torch.bfloat16", "torch.float32")
        assert largest_difference(plain, after) <= 0.05 * moved


OBJECTIVES: dict[str, dict[str, Any]] = {
    "convirt": {},
    "siglip": {},
    "gloria": {},
    "mgca": {"num_prototypes": 6},
    "gcl": {"learnable_temperature": True},
}


@pytest.mark.parametrize(
    "name", [name if name in ("ita", "gcl") else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_no_objective_knows_ranks_or_micro_batches(dataset: Path, tmp_path: Path, name: str) -> None:
    def step(num_ranks: int, micro_batch_size: int | None) -> Any:
        config = tree(
            dataset, tmp_path, topology__ranks_per_slot=num_ranks, objective__anchor_weight=0.0,
            objective__name=name, data__batch_size=BATCH_SIZE, data__micro_batch_size=micro_batch_size,
            **{f"objective__{key}": value for key, value in OBJECTIVES[name].items()},
        )  # fmt: skip
        ranks = on_ranks(one_step, num_ranks, config)
        return [assemble([rank[key] for rank in ranks]) for key in ("before", "after")]

    before, plain = step(1, None)
    assert largest_difference(before, plain) > 1e-2
    for num_ranks, micro_batch_size in ((1, 5), (2, 3)):
        assert largest_difference(plain, step(num_ranks, micro_batch_size)[1]) <= 1e-5
