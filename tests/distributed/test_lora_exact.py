"""Rules of adapters whose mean is exact: the merged model beside a plain computation, on any layout, resumed and exported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CLIENTS,
    assemble,
    build_run,
    finish,
    make_config,
    metrics_of,
    on_each,
    on_ranks,
    run_all,
    same_bits,
    tree,
    watched,
    weights_of,
    zero,
)
from peft import PeftModel

from feddra_ds.checkpoint.format import folder_of
from feddra_ds.checkpoint.restore import load_checkpoint
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import from_dict
from feddra_ds.distributed.launch import Launch
from feddra_ds.evaluation.export import export
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.model.folder import load_pretrained
from feddra_ds.run.checks import check

A, B, FROZEN = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"
R, ALPHA, RANKS = 3, 6.0, {"north": 1, "west": 5}
SLOW = pytest.mark.slow
CASES = [  # a rule; ranks, ranks of a slot, ZeRO stage
    ("stack", (2, 1, 0)),
    pytest.param("residual", (4, 2, 3), marks=SLOW),
    pytest.param("residual", (4, 2, 0), marks=pytest.mark.exhaustive),
    pytest.param("residual", (2, 1, 2), marks=pytest.mark.exhaustive),
    pytest.param("alternate", (4, 2, 2), marks=SLOW),
    pytest.param("alternate", (2, 1, 3), marks=pytest.mark.exhaustive),
    pytest.param("stack", (4, 2, 3), marks=pytest.mark.exhaustive),
]


def _settings(rule: str, **more: Any) -> dict[str, Any]:
    adapter = {"type": "lora", "r": R, "alpha": ALPHA, "aggregation": rule}
    adapter |= {"target_modules": ["query", "dense", "q_proj", "fc1"]} | ({"ranks": RANKS} if rule == "stack" else {})
    settings = {"model__adapter": adapter, "optimizer__name": "adamw", "optimizer__lr": 0.01, "evaluation__every": 0}
    return settings | {"schedule__stage1_steps": 1, "schedule__stage2_steps": 2, "schedule__rounds": 2} | more


def _first(config: Any) -> dict[str, np.ndarray]:
    """The model that a run begins with, by name."""
    torch.manual_seed(config.run.seed)
    return {name: p.detach().numpy() for name, p in model_of(config, tokenizer_of(config)).named_parameters()}


def _layers(first: Mapping[str, np.ndarray]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, shape of A, shape of B) of each adapted layer."""
    for name in first:
        if name.endswith(A):
            layer = name.removesuffix(A)
            yield layer, first[name].shape, first[layer + B].shape


def _update(state: Mapping[str, np.ndarray], layer: str, a: tuple[int, ...], b: tuple[int, ...]) -> np.ndarray:
    """s B A in float64."""
    return ALPHA / R * state[layer + B].reshape(b).astype(float) @ state[layer + A].reshape(a).astype(float)


def look(config_tree: dict[str, Any]) -> dict[str, Any]:
    """All rounds, and then the frozen weights under adapters that the forward uses."""
    run = build_run(config_tree)
    run.rounds()
    with run.engine._gathered(run.engine.module):
        named = run.engine.module.named_parameters()
        live = {name: p.detach().float().numpy().copy() for name, p in named if name.endswith(FROZEN)}
    finish(run)
    return live


@pytest.mark.parametrize(("rule", "layout"), CASES)
def test_the_merged_model_is_the_exact_mean(
    dataset: Path, tmp_path: Path, rule: str, layout: tuple[int, int, int]
) -> None:
    ranks, per_slot, stage = layout
    place = {"deepspeed": zero(stage) | {"gradient_clipping": 0.1}, "topology__ranks_per_slot": per_slot}
    out = tmp_path / "run"
    config = tree(dataset, out, **_settings(rule), **place)
    seen = on_ranks(watched, ranks, config)
    first = _first(from_dict(config))
    before: dict[str, np.ndarray] = dict(first)
    for round_index, line in enumerate(metrics_of(out)):
        ends = _ends(seen, per_slot, round_index)
        p = dict(zip(line["client_ids"], line["client_weights"], strict=True))
        after = before | weights_of(out, round_index)
        differences, plain = [], []
        for layer, a, b in _layers(first):
            mean = sum(p[client] * _update(end, layer, a, b) for client, end in ends.items())
            found = after[layer + FROZEN].reshape(b[0], a[1]) + _update(after, layer, a, b)
            was = before[layer + FROZEN].reshape(b[0], a[1])
            differences.append(np.abs(found - (was + mean)).max())
            factors = {n: sum(p[c] * end[n] for c, end in ends.items()) for n in (layer + A, layer + B)}
            plain.append(np.abs(_update(factors, layer, a, b) - mean).max())
        assert max(differences) <= 1e-6, "the merged model is not the mean of the clients' merged models"
        assert (max(plain) > 1e-5) == (rule != "alternate"), "the mean of factors would have been as good"
        _check_factors(rule, round_index, ends, before, after, first)
        before = after
    _check_resumed(rule, out, config, ranks, before)


def _ends(seen: list[dict[str, Any]], per_slot: int, round_index: int) -> dict[str, dict[str, np.ndarray]]:
    """The adapters of each client after the round's last stage, whole."""
    ends = {}
    for first in range(0, len(seen), per_slot):
        slot = [rank["stages"] for rank in seen[first : first + per_slot]]
        for ranks in zip(*slot, strict=True):
            if (ranks[0]["round"], ranks[0]["stage"]) == (round_index, "stage2"):
                ends[ranks[0]["client"]] = assemble([rank["after"] for rank in ranks])
    assert ends.keys() == CLIENTS.keys()
    return ends


def _check_factors(rule: str, round_index: int, ends: Any, before: Any, after: Any, first: Any) -> None:
    for layer, a, b in _layers(first):
        if rule == "alternate":
            rests, trains = (A, B) if round_index % 2 == 0 else (B, A)
            for client, end in ends.items():
                assert end[layer + rests].tobytes() == before[layer + rests].tobytes(), (client, layer)
                assert np.abs(end[layer + trains] - before[layer + trains].ravel()).max() > 1e-5, (client, layer)
            assert after[layer + rests].tobytes() == before[layer + rests].tobytes()
        elif rule == "stack":
            for client, end in ends.items():
                rank = RANKS.get(client, R)
                found = end[layer + A].reshape(a), end[layer + B].reshape(b)
                assert not found[0][rank:].any()
                assert not found[1][:, rank:].any()
                assert np.linalg.matrix_rank(found[1][:, :rank]) > 0, "it trains"
            assert not after[layer + B].any()
            assert after[layer + A].any(axis=None)
            assert after[layer + A].tobytes() != before[layer + A].tobytes(), "A is drawn anew"


def _check_resumed(rule: str, out: Path, config: dict[str, Any], ranks: int, ended: Mapping[str, np.ndarray]) -> None:
    """A run that is cut after its first round ends with the same bits, and its forward uses what is saved."""
    again = out.with_name("again")
    shutil.copytree(out, again)
    shutil.rmtree(folder_of(again, 1))
    for live in on_ranks(look, ranks, config | {"run": config["run"] | {"output_dir": str(again)}}):
        for name, values in live.items():
            assert values.tobytes() == ended[name].tobytes(), f"the forward has another {name}"
    assert same_bits(weights_of(again, 1), weights_of(out, 1))
    moved = [name for name in weights_of(out, 1) if name.endswith(FROZEN)]
    assert bool(moved) == (rule != "alternate")


@pytest.mark.parametrize("rule", ["residual", pytest.param("stack", marks=pytest.mark.slow)])
def test_export_holds_what_the_server_moved(dataset: Path, tmp_path: Path, rule: str) -> None:
    out = tmp_path / "run"
    config = tree(dataset, out, deepspeed=zero(0), **_settings(rule))
    on_each(run_all, [(config,)])
    whole, _ = load_checkpoint(folder_of(out, 1))
    written, _ = load_pretrained(out / "model")
    for (name, one), two in zip(whole.state_dict().items(), written.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    export(out, tmp_path / "adapter", kind="adapter")
    torch.manual_seed(from_dict(config).run.seed)
    plain = model_of(make_config(dataset, out, **_settings(rule, model__adapter=None)), tokenizer_of(from_dict(config)))
    for side in ("vision", "text"):
        encoder = getattr(plain.backbone, side)
        moved = {n: p.detach().clone() for n, p in encoder.named_parameters()}
        merged = PeftModel.from_pretrained(encoder, tmp_path / "adapter" / side).merge_and_unload()
        wanted = getattr(whole.backbone, side).state_dict()
        gaps = {name: float((p - wanted[name]).abs().max()) for name, p in merged.named_parameters()}
        assert gaps.keys() == moved.keys()
        assert max(gaps.values()) <= 1e-6, max(gaps, key=gaps.__getitem__)
        assert max(float((wanted[n] - p).abs().max()) for n, p in moved.items()) > 1e-3, "training moved nothing"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_alternate_sends_one_factor(dataset: Path, tmp_path: Path, precision: str) -> None:
    """B in the first round, A in the second; what rests is not touched, rounded deltas or not, nor by FedProx's pull."""
    first = _first(make_config(dataset, tmp_path, **_settings("alternate")))
    sizes: dict[str, int] = {}
    for name, tensor in first.items():
        which = (
            "A" if name.endswith(A) else "B" if name.endswith(B) else "aligner" if name.startswith("aligner") else ""
        )
        sizes[which] = sizes.get(which, 0) + tensor.size
    more = {"aggregate__after_stage1": False, "topology__ranks_per_slot": 1, "deepspeed": zero(1)}
    more |= {"aggregate__precision": precision, "strategy": {"name": "fedprox", "mu": 0.1}}
    on_ranks(run_all, 2, tree(dataset, tmp_path, **_settings("alternate"), **more))
    width = {"fp32": 4, "int8": 1 + 1 / 64}[precision]  # int8: with a scale for each block
    ends = [weights_of(tmp_path, round_index) for round_index in (0, 1)]
    for line, trains in zip(metrics_of(tmp_path), "BA", strict=True):
        assert line["bytes_sent_per_rank"] == pytest.approx(width * (sizes["aligner"] + sizes[trains]), rel=0.1)
    for layer, _, _ in _layers(first):
        assert ends[0][layer + A].tobytes() == first[layer + A].tobytes()
        assert ends[1][layer + B].tobytes() == ends[0][layer + B].tobytes()
        assert np.abs(ends[0][layer + B]).max() > 1e-4
        assert np.abs(ends[1][layer + A] - ends[0][layer + A]).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rule": "residual", "aggregate__precision": "int8"}, r"aggregate.precision: int8 .* use fp32, or factors"),
        ({"rule": "stack", "aggregate__precision": "bf16"}, r"aggregate.precision: bf16 .*stack needs"),
        ({"rule": "stack", "ranks": {"east": 2}}, r"model.adapter.ranks: east are no clients of this run"),
        ({"rule": "residual", "ranks": {"north": 2}}, r"model.adapter.ranks: aggregation=residual .* use stack"),
        ({"rule": "stack", "ranks": {"north": 0}}, r"model.adapter.ranks.north: "),
        ({"rule": "residual", "deepspeed": zero(3, offload_param={"device": "nvme"})}, r"offload_param.device=nvme"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    dataset: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    rule, ranks = changes.pop("rule"), changes.pop("ranks", None)
    settings = _settings(rule, **changes)
    if ranks is not None:
        settings["model__adapter"]["ranks"] = ranks
    with pytest.raises(ConfigError, match=line):
        check(make_config(dataset, tmp_path, **settings), Launch.from_environment())
