"""The fp32 masters behind one DeepSpeed engine: written weights count at once, survive steps, and lose nothing.

Each case builds one engine over a slot of 1 or 2 ranks and does everything to it; the tests assert on what it saw.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import assemble, make_config, on_each, pieces_of, same_bits, tree, with_bad_gradient, zero

ADAMW = {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "optimizer__weight_decay": 0.05}
BATCH = 4  # pairs per rank


# ---- inside a rank
def _engine(config: Any, whole: bool = False) -> tuple[Any, Any, Any]:
    """An engine over all ranks as one slot, a plain copy of its model, and the topology.

    The engine gets its weights one by one, as in a run, or `whole`, where a model cannot be deferred.
    """
    import torch

    from feddra_ds.distributed.launch import Launch
    from feddra_ds.distributed.plan import plan
    from feddra_ds.distributed.topology import Topology
    from feddra_ds.engine.engine import Engine
    from feddra_ds.model.build import model_of, tokenizer_of
    from feddra_ds.model.weights.deferred import defer
    from feddra_ds.run.build import seed_everything

    launch = Launch.from_environment()
    topology = Topology(plan(launch.world_size, 1, launch.world_size), launch, torch.device("cpu"), 60.0)
    seed_everything(config.run.seed)
    model = model_of(config, tokenizer_of(config))
    plain, initial = copy.deepcopy(model), None
    if not whole:
        after = torch.get_rng_state()
        seed_everything(config.run.seed)
        model, initial = defer(lambda: model_of(config, tokenizer_of(config)))
        assert initial is not None
    engine = Engine(
        model,
        config,
        device=topology.device,
        slot_rank=topology.slot_rank,
        ranks_per_slot=launch.world_size,
        weights=initial,
    )
    assert whole or torch.equal(after, torch.get_rng_state()), "what is drawn next depends on how the model was built"
    return engine, plain, topology


def _batch(seed: int, dtype: Any) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(BATCH, 3, 32, 32, generator=draw).to(dtype),
        "input_ids": torch.randint(5, 6000, (BATCH, 16), generator=draw),
        "attention_mask": torch.ones(BATCH, 16, dtype=torch.int64),
    }


def _forward_gap(engine: Any, plain: Any) -> float:
    """Largest difference between the engine's embeddings and a plain model's in the same dtype."""
    import torch

    twin = copy.deepcopy(plain).to(engine.dtype).eval()
    engine.train(False)
    with torch.no_grad():
        batch = _batch(99, engine.dtype)
        live, wanted = engine(**batch), twin(**batch)
    gaps = [(live.image_embeds - wanted.image_embeds), (live.text_embeds - wanted.text_embeds)]
    gaps.append(torch.as_tensor(live.temperature) - torch.as_tensor(wanted.temperature))
    return max(float(gap.abs().max()) for gap in gaps)


def _steps(engine: Any, topology: Any, rate: float, count: int = 1, bad: int | None = None) -> list[bool]:
    """Some steps, and after step `bad` another whose gradient is not finite on the last rank; whether each was taken."""
    from feddra_ds.losses.fused import fused_dro_loss

    engine.set_learning_rates({"aligner": rate, "backbone": rate})
    engine.train()
    taken = []
    order = list(range(count)) if bad is None else [*range(bad + 1), -1, *range(bad + 1, count)]
    for step in order:
        out = engine(**_batch(1000 * topology.rank + abs(step), engine.dtype))
        group = topology.slot_group if topology.plan.ranks_per_slot > 1 else None
        loss = fused_dro_loss(
            out.image_embeds, out.text_embeds, temperature=out.temperature, group=group, impl="chunked"
        ).total
        last = topology.rank == topology.plan.world_size - 1
        engine.backward(with_bad_gradient(loss) if step == -1 and last else loss)
        taken.append(engine.step())
    return taken


def _write(engine: Any, plain: Any, seed: int) -> None:
    """Make random weights W, put them into the plain model, and write them with the padding full of garbage."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            spread = 0.1 if "norm" in name.lower() or parameter.ndim == 1 else 0.25
            parameter.add_(spread * torch.randn(parameter.shape, generator=draw))
    wanted = dict(plain.named_parameters())
    states = {}
    for part in ("aligner", "backbone"):
        state = [torch.full_like(s, 1e30, device="cpu") for s in engine.slices(part)]
        for fragment, values in engine.views_of(part, state):
            values.copy_(wanted[fragment.name].detach().flatten()[fragment.start : fragment.start + fragment.length])
        states[part] = state
    engine.write(states)


def _adopt(engine: Any, plain: Any) -> None:
    """Make the plain model (on one rank) hold the engine's masters."""
    import torch

    wanted = dict(plain.named_parameters())
    with torch.no_grad():
        for name, start, values in pieces_of(engine):
            wanted[name].flatten()[start : start + len(values)] = torch.from_numpy(values)


def examine(config_tree: dict[str, Any], optimizer: str | None = None, whole: bool = False) -> dict[str, Any]:
    """Everything that is asked of one engine, on each rank of its slot."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.engine import engine as engine_module

    with patch.object(engine_module, "build_optimizer", _fused_adam if optimizer else engine_module.build_optimizer):
        engine, plain, topology = _engine(from_dict(config_tree), whole)
    seen: dict[str, Any] = {
        "class": type(engine._ds.optimizer).__name__,
        "zero": engine.zero_stage,
        "initial": pieces_of(engine),
        "wanted": {n: p.detach().flatten().numpy().copy() for n, p in plain.named_parameters()},
        "initial_gap": _forward_gap(engine, plain),
        "spans": [
            (part, number, fragment.name, fragment.offset, fragment.length, one.tensor.numel())
            for part in ("aligner", "backbone")
            for number, one in enumerate(engine._slices[part])
            for fragment in one.fragments
        ],
    }
    _write(engine, plain, seed=5)
    seen["written_gap"] = _forward_gap(engine, plain)
    seen["written"] = pieces_of(engine)
    seen["w"] = {n: p.detach().flatten().numpy().copy() for n, p in plain.named_parameters()}
    _steps(engine, topology, 0.0, 2)
    seen["lr0_gap"] = _forward_gap(engine, plain)
    seen["lr0"] = pieces_of(engine)

    # the same training twice: after a reset, and, to see that it matters, without one
    start = {part: engine.snapshot(part) for part in ("aligner", "backbone")}
    for name in ("first", "second", "stale"):
        engine.write(start)
        if name != "stale":
            engine.reset_optimizer()
        _steps(engine, topology, 1e-3, 3)
        seen[name] = pieces_of(engine)
    for name, bad in (("plain", None), ("skipping", 0)):
        engine.write(start)
        engine.reset_optimizer()
        seen[f"{name}_taken"] = _steps(engine, topology, 1e-3, 3, bad)
        seen[name] = pieces_of(engine)
    if topology.plan.world_size == 1:
        _adopt(engine, plain)
        seen["trained_gap"] = _forward_gap(engine, plain)
    topology.close()
    return seen


def _fused_adam(groups: Any, config: Any, ds_config: Any) -> Any:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, lr=config.optimizer.lr, adam_w_mode=True)


# ---- what must hold
def _check(seen_by_rank: list[dict[str, Any]]) -> None:
    first = seen_by_rank[0]
    whole = lambda key: assemble([seen[key] for seen in seen_by_rank])
    assert same_bits(whole("initial"), first["wanted"]), "the initial masters are not the fp32 model's"
    assert same_bits(whole("written"), first["w"])
    assert same_bits(whole("lr0"), first["w"]), "a step with lr 0 moved a master"
    _check_coverage(seen_by_rank)
    for seen in seen_by_rank:
        for key in ("initial_gap", "written_gap", "lr0_gap", "trained_gap"):  # bf16 too: the casts are the same
            assert seen.get(key, 0.0) <= 1e-6, (key, seen[key])
    assert same_bits(whole("first"), whole("second")), "reset_optimizer left something behind"
    assert not same_bits(whole("first"), first["w"])
    for seen in seen_by_rank:
        assert seen["plain_taken"] == [True, True, True]
        assert seen["skipping_taken"] == [True, False, True, True]
    assert same_bits(whole("plain"), whole("skipping")), (
        "a step with a gradient that is not finite left something behind"
    )
    if "sgd" not in first["optimizer"]:
        assert not same_bits(whole("first"), whole("stale"))


def _check_coverage(seen_by_rank: list[dict[str, Any]]) -> None:
    """Every element of every parameter once per slot (ZeRO 0: once per rank), in slices of its part, none overlapping."""
    sizes = {name: len(values) for name, values in seen_by_rank[0]["wanted"].items()}
    counts = []
    for seen in seen_by_rank:
        covered: dict[str, int] = {}
        ends: dict[tuple[str, int], int] = {}
        for part, number, name, offset, length, numel in seen["spans"]:
            assert name.startswith(f"{part}.")
            assert offset >= ends.get((part, number), 0), "fragments overlap"
            assert length > 0
            ends[part, number] = offset + length
            assert offset + length <= numel
            covered[name] = covered.get(name, 0) + length
        counts.append(covered)
    if seen_by_rank[0]["zero"] == 0:
        assert all(covered == sizes for covered in counts)
    else:
        assert {name: sum(c.get(name, 0) for c in counts) for name in sizes} == sizes


def _run(dataset: Path, rows: list[tuple[str, dict[str, Any]]], world_size: int, *extra: Any) -> dict[str, list[Any]]:
    trees = [tree(dataset, Path("unused"), data__batch_size=BATCH * world_size, **changes) for _, changes in rows]
    results = on_each(examine, [(t, *extra) for t in trees], world_size=world_size)
    for (_, changes), seen_by_rank in zip(rows, results, strict=True):
        for seen in seen_by_rank:
            seen["optimizer"] = changes.get("optimizer__name", "sgd")
    return dict(zip([name for name, _ in rows], results, strict=True))


SMALL = {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
PERSISTENT = {"stage3_param_persistence_threshold": 100_000, "stage3_model_persistence_threshold": 1_000_000}
GRAD_FP32 = {**zero(1, bf16=True), "data_types": {"grad_accum_dtype": "fp32"}}
STAGES = [
    (f"zero{stage}-{'bf16' if bf16 else 'fp32'}", {**ADAMW, "deepspeed": zero(stage, bf16=bf16)})
    for stage in range(4)
    for bf16 in (False, True)
]
FORMS = [
    ("zero1-bf16-grad-fp32", {**ADAMW, "deepspeed": GRAD_FP32}),
    ("zero3-fp32-subgroups", {**ADAMW, "deepspeed": zero(3, **SMALL)}),
    ("zero3-fp32-persistent", {**ADAMW, "deepspeed": zero(3, **PERSISTENT)}),
    ("zero0-fp32-clipped", {**ADAMW, "deepspeed": {"gradient_clipping": 1.0}}),
]
OTHERS = [
    ("zero3-bf16-subgroups", {**ADAMW, "deepspeed": zero(3, bf16=True, **SMALL)}),
    ("zero0-fp32-sgd", {"deepspeed": {}}),
    ("zero0-bf16-sgd", {"deepspeed": zero(0, bf16=True)}),
    ("zero2-fp32-sgd", {"deepspeed": zero(2), "optimizer__momentum": 0.9}),
    ("zero3-bf16-sgd", {"deepspeed": zero(3, bf16=True)}),
]
CLASSES = {
    "zero0-fp32": "AdamW",
    "zero0-bf16": "FP16_UnfusedOptimizer",
    "zero1-fp32": "DeepSpeedZeroOptimizer",
    "zero2-bf16": "DeepSpeedZeroOptimizer",
    "zero1-bf16-grad-fp32": "BF16_Optimizer",
    "zero3-fp32": "DeepSpeedZeroOptimizer_Stage3",
}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
COMPILED = [  # optimizers that DeepSpeed compiles at first use
    ("zero2-fp32-offload", {**ADAMW, "deepspeed": zero(2, **OFFLOAD)}),
    ("zero2-bf16-offload", {**ADAMW, "deepspeed": zero(2, bf16=True, **OFFLOAD)}),
    ("zero3-bf16-offload", {**ADAMW, "deepspeed": zero(3, bf16=True, **OFFLOAD)}),
]


@pytest.mark.parametrize(
    ("world_size", "rows"),
    [
        pytest.param(1, STAGES, marks=pytest.mark.exhaustive),
        pytest.param(1, FORMS + OTHERS, marks=pytest.mark.exhaustive),
        pytest.param(2, STAGES, marks=pytest.mark.slow),
        pytest.param(2, FORMS + OTHERS, marks=pytest.mark.exhaustive),
    ],
    ids=["1 rank", "1 rank, more", "2 ranks", "2 ranks, more"],
)
def test_masters_of_every_zero_stage_and_precision(
    dataset: Path, world_size: int, rows: list[tuple[str, dict[str, Any]]]
) -> None:
    results = _run(dataset, rows, world_size)
    _check_all(results, world_size)
    for name, expected in CLASSES.items():
        assert name not in results or results[name][0]["class"] == expected, name


@pytest.mark.slow
def test_masters_of_a_model_that_comes_whole(dataset: Path) -> None:
    rows = [row for row in STAGES if row[0] in ("zero0-fp32", "zero2-bf16", "zero3-bf16")]
    _check_all(_run(dataset, rows, 2, None, True), 2)


@pytest.mark.slow
def test_masters_of_an_offloaded_optimizer(dataset: Path) -> None:
    on_each(_compile, [("CPUAdam",)], timeout=550)  # once, lest two ranks build it at a time
    _check_all(_run(dataset, COMPILED, 2), 2)


@pytest.mark.slow
def test_masters_of_deepspeeds_own_adam(dataset: Path) -> None:
    on_each(_compile, [("FusedAdam",)], timeout=550)
    rows = [
        ("zero0-bf16", {**ADAMW, "deepspeed": zero(0, bf16=True)}),
        ("zero1-bf16", {**ADAMW, "deepspeed": GRAD_FP32}),
    ]
    results = _run(dataset, rows, 2, "fused")
    _check_all(results, 2)
    assert results["zero0-bf16"][0]["class"] == "FP16_Optimizer"


def _compile(kind: str) -> None:
    import torch
    from deepspeed.ops import adam

    from feddra_ds.engine.build_locks import stale_locks

    for lock in stale_locks():  # of a test run that was killed in the midst of a build
        lock.unlink()
    name = "DeepSpeedCPUAdam" if kind == "CPUAdam" else kind
    getattr(adam, name)([torch.nn.Parameter(torch.ones(4))])


def _check_all(results: dict[str, list[Any]], world_size: int) -> None:
    for name, seen_by_rank in results.items():
        try:
            _check(seen_by_rank)
        except AssertionError as error:
            raise AssertionError(f"{name} on {world_size} ranks: {error}") from error


def test_an_optimizer_that_was_never_tried_is_refused() -> None:
    from feddra_ds.engine.masters import find_masters

    class NewOptimizer:
        pass

    with pytest.raises(RuntimeError, match="built a NewOptimizer, whose master weights feddra_ds does not know"):
        find_masters(SimpleNamespace(optimizer=NewOptimizer()), SimpleNamespace(named_parameters=list), 0, 1)


def test_groups_are_parts_and_decay_is_for_matrices_alone(dataset: Path) -> None:
    from feddra_ds.engine.optimizer import parameter_groups
    from feddra_ds.model.build import model_of, tokenizer_of

    config = make_config(dataset, Path("unused"))
    model = model_of(config, tokenizer_of(config))
    groups = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [(group["part"], group["weight_decay"]) for group in groups] == [
        ("aligner", 0.05), ("aligner", 0.0), ("backbone", 0.05), ("backbone", 0.0),
    ]  # fmt: skip
    seen = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name.startswith(f"{group['part']}.")
            plain = name.endswith("bias") or "norm" in name.lower() or "log_ratio" in name
            assert plain or group["weight_decay"] > 0 or "layers.1" in name, name
            assert not (plain and group["weight_decay"] > 0), name
    every = parameter_groups(model, 0.05, decay_all=True)
    assert [(group["part"], group["weight_decay"]) for group in every] == [("aligner", 0.05), ("backbone", 0.05)]
    assert sum(len(group["params"]) for group in every) == len(names)
    assert {g["part"] for g in parameter_groups(model, 0.0)} == {"aligner", "backbone"}
    assert len(parameter_groups(model, 0.0)) == 2
    assert np.isclose(sum(p.numel() for g in groups for p in g["params"]), sum(p.numel() for p in model.parameters()))
