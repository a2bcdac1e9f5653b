"""The memory plan: its counts against a model that is really built, its trace against torch's, its levers, its advice."""

from __future__ import annotations

import functools
import json
import resource
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from documented_json import check_documented
from model_helpers import BODY
from run_helpers import make_config, make_data

from feddra_ds.cli import main
from feddra_ds.common.tree import set_path
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.doctor.memory.ledger import KEPT, LARGE, Blocks, Ledger, blocks
from feddra_ds.doctor.memory.plan import MemoryPlan, plan_memory
from feddra_ds.doctor.memory.trace import Event, Sizes, StepTracer
from feddra_ds.doctor.memory.verdict import Machine, judge
from feddra_ds.engine.optimizer import bucket_elements, parameter_groups
from feddra_ds.model.build import model_of, tokenizer_of

WIDE = {**BODY, "hidden_size": 128, "intermediate_size": 512}


def config(**changes: Any) -> Config:
    """A small config; `changes` are dotted keys with `__` for the dot."""
    tree = make_config(Path("run"), Path("data")).model_dump()
    tree["data"] |= {"batch_size": 16, "image_size": 32, "text_length": 16}
    tree["evaluation"]["every"] = 0
    tree["model"]["vision"]["config"] = {"model_type": "vit", "patch_size": 8, **WIDE}
    tree["model"]["text"]["config"] = {"model_type": "bert", **WIDE}
    for key, value in changes.items():
        set_path(tree, key.replace("__", "."), value)
    return from_dict(tree)


def meta_model(c: Config) -> Any:
    tokenizer = tokenizer_of(c)
    with torch.device("meta"):
        return model_of(c, tokenizer)


def peak(events: list[Event]) -> int:
    """Most bytes that are held at a time."""
    sign = {"take": 1, "give": -1, "gradient": 0}
    return max(accumulate(sign[kind] * num_bytes for kind, num_bytes in events))


def planned(ranks: int = 1, clients: int = 1, device: str = "cpu", **changes: Any) -> MemoryPlan:
    return _planned(ranks, clients, device, json.dumps(changes))


@functools.cache  # many are compared with the same one
def _planned(ranks: int, clients: int, device: str, changes: str) -> MemoryPlan:
    c = config(**json.loads(changes))
    return plan_memory(c, meta_model(c), ranks_per_slot=ranks, clients_per_slot=clients, device=device, baseline=0)


def test_a_batchnorm_at_the_heads_output_is_planned_like_any_model() -> None:
    plain, normed = (planned(model__head__output_norm=norm) for norm in ("none", "batchnorm"))
    assert normed.trained == plain.trained  # it has no parameters


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}])
def test_counts_are_those_of_a_built_model(adapter: dict[str, Any] | None) -> None:
    c = config(model__adapter=adapter)
    real = model_of(c, tokenizer_of(c))
    plan = plan_memory(c, meta_model(c), baseline=0)
    parts = {"aligner": real.aligner, "backbone": real.backbone}
    assert plan.parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert plan.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert plan.trained == sum(p.numel() for g in parameter_groups(real, 0.05) for p in g["params"])
    assert (plan.trained < sum(plan.parameters.values())) == (adapter is not None)


@pytest.mark.parametrize("rows", [2, 6])
def test_the_trace_saves_what_autograd_saves(rows: int) -> None:
    c = config()
    sizes = Sizes(rows, c.data.image_size, c.data.text_length)
    events = StepTracer(meta_model(c), torch.float32).run("stage2", sizes)
    real = model_of(c, tokenizer_of(c))
    own = {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return x

    ids = torch.ones(rows, c.data.text_length, dtype=torch.int64)
    pixels = torch.zeros(rows, 3, c.data.image_size, c.data.image_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        real(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = sum(storage.nbytes() for storage in saved.values())
    first = next(number for number, event in enumerate(events) if event.kind == "gradient")
    assert (
        wanted <= peak(events[:first]) <= 1.25 * wanted
    )  # later ones hold gradients of embeddings, larger than all this
    gradients = sum(event.num_bytes for event in events if event.kind == "gradient")
    assert gradients == 4 * sum(p.numel() for p in real.parameters())
    assert sum({"take": 1, "give": -1, "gradient": 0}[e.kind] * e.num_bytes for e in events) == 0


def test_stage_1_holds_less_than_stage_2_and_embedding_least() -> None:
    c = config(model__vision__config={"model_type": "vit", "patch_size": 8, **WIDE, "num_hidden_layers": 6})
    tracer = StepTracer(meta_model(c), torch.float32)
    heights = [peak(tracer.run(what, Sizes(8, 32, 16))) for what in ("embed", "stage1", "stage2")]
    assert heights == sorted(heights)
    assert 1.5 * heights[0] < heights[2]


LEVERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"data__batch_size": 64, "data__micro_batch_size": 2}, {"data__batch_size": 64}),
    ({}, {"data__batch_size": 64}),
    ({"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "ranks": 2},
     {"deepspeed": {"zero_optimization": {"stage": 2}}, "ranks": 2}),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}, "ranks": 4},
     {"deepspeed": {"zero_optimization": {"stage": 2}}, "ranks": 2}),
    ({"deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}, "ranks": 2},
     {"deepspeed": {"zero_optimization": {"stage": 3}}, "ranks": 2}),
    ({"model__adapter": {"type": "lora", "r": 4}}, {}),
    ({"model__adapter": {"type": "lora", "r": 4}}, {"model__adapter": {"type": "lora", "r": 4, "aggregation": "stack"}}),
    ({}, {"objective__anchors": "resident"}),
    ({}, {"aggregate__precision": "int8"}),
    ({}, {"clients": 4}),
    ({"optimizer__name": "sgd"}, {}),
    ({}, {"clients": 3, "strategy__name": "local"}),
    ({}, {"aggregate__ema": 0.9}),
    ({"strategy__name": "afl"}, {"strategy__name": "drfa"}),
    ({"strategy__name": "fedavg"}, {"strategy__name": "moon"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("less", "more"),
    [pytest.param(*pair, marks=pytest.mark.slow if n % 2 else []) for n, pair in enumerate(LEVERS)],
)
def test_every_lever_moves_the_peak_the_right_way(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert planned(**less).bytes_of("host") < planned(**more).bytes_of("host")


@pytest.mark.parametrize("offload", ["offload_optimizer", "offload_param"])
def test_on_a_gpu_the_server_is_on_the_host_and_offload_moves_bytes_there(offload: str) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    plain = planned(device="cuda", deepspeed={"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}})
    moved = planned(device="cuda", deepspeed={"zero_optimization": {**zero, offload: {"device": "cpu"}}})
    assert moved.bytes_of("device") < plain.bytes_of("device")
    assert moved.bytes_of("host") > plain.bytes_of("host")
    device = plain.peak("device")
    assert device is not None
    assert not any(name.startswith(("server", "data")) for name in device.items)
    many = planned(device="cuda", clients=8, deepspeed={"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}})
    assert many.bytes_of("device") == plain.bytes_of("device"), "a slot's clients share the device"


def test_a_gpu_holds_what_adam_is_known_to_need() -> None:
    plan = planned(device="cuda")
    high = plan.peak("device")
    assert high is not None
    total = sum(plan.parameters.values())
    assert high.items["weights"] == 4 * total
    assert high.items["optimizer state"] == 8 * total


def test_a_checkpoint_is_written_from_a_copy_on_the_host() -> None:
    items = planned(device="cuda", aggregate__ema=0.9).host["stage2"].items
    held = items["server: global model"] + items["server: average over rounds"]
    assert items["checkpoint that is being written"] == held


def test_the_ledger_keeps_small_blocks_as_malloc_does() -> None:
    ledger = Ledger(keeps=True)
    ledger.begin("a")
    ledger.hold("x", blocks([100, LARGE]))
    ledger.drop("x")
    ledger.begin("b")
    ledger.hold("y", Blocks(0, LARGE))
    assert ledger.highs["a"].total == 100 + LARGE
    assert ledger.highs["b"].items == {"y": LARGE, KEPT: 100}
    plain = Ledger(keeps=False)
    plain.begin("a")
    plain.replay([Event("take", 100), Event("take", 10), Event("give", 100), Event("take", 50), Event("give", 60)])
    assert plain.highs["a"].total == 110


@pytest.mark.slow
def test_a_billion_parameters_take_seconds_and_little_memory() -> None:
    vision = {"model_type": "vit", "patch_size": 14, "hidden_size": 1280, "num_hidden_layers": 32,
              "num_attention_heads": 16, "intermediate_size": 5120}  # fmt: skip
    text = {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": 4096, "vocab_size": 30522}  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = planned(
        device="cuda", clients=4, data__image_size=224, data__text_length=112, data__batch_size=256,
        model__vision__config=vision, model__text__config=text, deepspeed={"bf16": {"enabled": True}},
        data__micro_batch_size=32, data__augment__crop_scale=1.0,
    )  # fmt: skip
    assert sum(plan.parameters.values()) > 9e8
    assert plan.bytes_of("device") > 16 * 9e8
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4e8, "no weights were built"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("plan") / "data")


def on_data(data: Path, **changes: Any) -> Config:
    # west, which has 12 pairs and no val split, must keep none of them for its losses
    changes = {"dro__evaluate_on": "train", **changes}
    return config(data__root=str(data), data__batch_size=12, run__output_dir=str(data.parent / "run"), **changes)


@pytest.mark.slow
def test_what_does_not_fit_names_keys_and_what_each_saves(data: Path) -> None:
    c = on_data(data, data__image_size=96)
    enough = judge(c, 1, Machine(host=10**11, ranks_here=1, device=None))
    assert enough.short is None
    assert enough.changes == []
    assert enough.clients_per_slot == 3
    needed = enough.plan.bytes_of("host")
    verdict = judge(c, 1, Machine(host=needed - 1, ranks_here=1, device=None))
    assert verdict.short == "host"
    keys = {change.key: change for change in verdict.changes}
    assert {"data.micro_batch_size", "model.adapter"} <= set(keys)
    assert [c.saves for c in verdict.changes] == sorted((c.saves for c in verdict.changes), reverse=True)
    assert all(change.fits for change in verdict.changes)
    micro = keys["data.micro_batch_size"]
    smaller = judge(on_data(data, data__image_size=96, data__micro_batch_size=micro.value), 1, verdict.machine)
    assert needed - smaller.plan.bytes_of("host") == micro.saves
    assert smaller.short is None


@pytest.mark.slow
def test_on_a_gpu_that_is_too_small_offload_is_offered(data: Path) -> None:
    zero = {"stage": 1, "reduce_bucket_size": 1000}
    verdict = judge(on_data(data, deepspeed={"zero_optimization": zero}), 1, Machine(10**12, 1, 10**6))
    assert verdict.short == "device"
    keys = [change.key for change in verdict.changes]
    assert "deepspeed.zero_optimization.offload_optimizer" in keys
    assert "deepspeed.bf16.enabled" in keys
    check_documented("doctor --plan", verdict.as_dict(), but="^$")


@pytest.mark.slow
def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(on_data(data).model_dump(mode="json")))
    words = ["doctor", "--plan", "--config", str(path)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "weights" in text
    assert text.rstrip().endswith("fits")
    assert main([*words, "--gpu", "0.001"]) == 1  # plans what each remedy would save
    text = capsys.readouterr().out
    assert "does not fit: device" in text
    assert "--model.adapter '{'type': 'lora', 'r': 8}'   saves" in text
    assert main([*words, "--json", "--data.micro_batch_size", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["peak"]["host"] == sum(told["items"]["host"].values())
    check_documented("doctor --plan", told, but="device|short|changes")
    assert not (data.parent / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan"], "--plan: needs --config FILE"),
        (["--gpu", "80"], "--gpu: is a number of GiB for --plan"),
        (["--plan", "--gpu", "-1", "--config", "x"], "--gpu: is a number of GiB for --plan"),
        (["--plan", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "elements"), [(None, 1000), (5e8, 1000), (64, 64)])
def test_the_gradient_buffer_is_no_larger_than_what_trains(asked: float | None, elements: int) -> None:
    zero = {"stage": 3} | ({} if asked is None else {"reduce_bucket_size": asked})
    assert bucket_elements({"zero_optimization": zero}, 1000) == elements
