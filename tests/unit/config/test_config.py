"""The config: every problem at once, each with its key; every shipped config loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from feddra_ds.common.errors import ConfigError
from feddra_ds.common.tree import merge, set_path
from feddra_ds.config.load import class_of, dump, from_dict, known_keys, load

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
ROOT = {"data": {"root": "x"}}


def problems(tree: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(merge(ROOT, tree))
    return caught.value.problems


def test_four_mistakes_four_lines() -> None:
    lines = problems(
        {
            "run": {"sed": 1},
            "data": {"batch_size": 0},
            "dro": {"apply": "weights"},
            "deepspeed": {"scheduler": {"type": "WarmupLR"}},
        }
    )
    assert [line.split(":")[0] for line in lines] == ["run.sed", "data.batch_size", "dro.apply", "deepspeed.scheduler"]
    assert "did you mean run.seed?" in lines[0]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("schedule.round", "unknown key; did you mean schedule.rounds?"),
        ("rounds", "unknown key; did you mean schedule.rounds?"),
        ("round", "unknown key; did you mean schedule.rounds?"),
        ("lr", "unknown key; did you mean optimizer.lr?"),
        ("data.seed", "unknown key; did you mean run.seed?"),
        ("data.batchsize", "unknown key; did you mean data.batch_size?"),
        ("batch_size", "unknown key; did you mean data.batch_size or evaluation.batch_size?"),
        ("optimiser.lr", "unknown section; did you mean optimizer?"),
        ("model.visoin.pretrained", "unknown section; did you mean model.vision?"),
        ("xyzzy", "unknown key; `feddra-ds train --help` lists all keys"),
        ("dro", "is a section, whose keys are set one by one, such as dro.set (got 3)"),
        ("schedule.rounds.a", "must be a valid integer (got {'a': 3})"),
    ],
)
def test_a_misspelt_key_has_one_line_with_the_nearest(key: str, hint: str) -> None:
    tree: dict = {}
    set_path(tree, key, 3)
    (line,) = problems(tree)
    at = key if "section;" not in hint and not key.endswith(".a") else key.rpartition(".")[0]
    assert line == f"{at}: {hint}"


@pytest.mark.parametrize(
    ("tree", "key", "word"),
    [
        ({"data": {"root": None}}, "data.root", "needed"),
        ({"schedule": {"stage1_steps": 0, "stage2_steps": 0}}, "schedule.stage2_steps", "nothing would train"),
        ({"schedule": {"rounds": 2, "warmup_rounds": 2}}, "schedule.warmup_rounds", "after the warm-up"),
        ({"clients": {"ids": []}}, "clients.ids", "empty"),
        ({"clients": {"ids": ["a", "a"]}}, "clients.ids", "more than once"),
        ({"clients": {"ids": ["a"], "minimum": 2}}, "clients.minimum", "more than the 1"),
        ({"clients": {"per_round": 2, "minimum": 3}}, "clients.minimum", "more than clients.per_round"),
        ({"dro": {"fixed_weights": [0.5, 0.4]}}, "dro.fixed_weights", "sum to 1"),
        ({"dro": {"fixed_weights": [1.0]}, "clients": {"ids": ["a", "b"]}}, "dro.fixed_weights", "1 weights for 2"),
        ({"dro": {"evaluate_on": "anchors"}, "objective": {"anchor_weight": 0}}, "dro.evaluate_on", "anchor_weight"),
        ({"dro": {"evaluate_on": "anchors", "apply": "loss"}}, "dro.evaluate_on", "too late"),
        ({"data": {"batch_size": 1}}, "data.batch_size", "2 or more"),
        ({"dro": {"evaluation_pairs": 31}}, "dro.evaluation_pairs", "does not fill one batch"),
        (
            {"schedule": {"stage2_start": "global"}, "aggregate": {"after_stage1": False}},
            "schedule.stage2_start",
            "throw stage 1 away",
        ),
        ({"aggregate": {"sparsity": 0.05}}, "aggregate.precision", "use int2, int4 or no sparsity"),
        ({"aggregate": {"sparsity": 0.05, "precision": "int8"}}, "aggregate.precision", "int8 does not go"),
        ({"aggregate": {"precision": "int2"}}, "aggregate.precision", "needs aggregate.sparsity"),
        ({"aggregate": {"precision": "bf16", "rule": "median"}}, "aggregate.precision", "aggregate.rule=median needs"),
        ({"aggregate": {"precision": "int8", "min_cosine": 0.0}}, "aggregate.precision", "aggregate.min_cosine needs"),
        ({"aggregate": {"rule": "krum"}, "clients": {"per_round": 4}}, "aggregate.rule", "needs 5 clients in a round"),
        ({"aggregate": {"min_cosine": -1.0}, "clients": {"per_round": 2}}, "aggregate.min_cosine", "needs 3 clients"),
        (
            {"aggregate": {"ema": 0.9}, "model": {"adapter": {"type": "lora", "aggregation": "product"}}},
            "aggregate.ema",
            "use factors or freeze_a, or null",
        ),
        ({"model": {"text": {"pretrained": "x", "config": {}}}}, "model.text.config", "contradicts"),
        ({"model": {"text": {"num_layers": 6}}}, "model.text.num_layers", "num_hidden_layers in model.text.config"),
        (
            {"data": {"augment": {"method": "pad_crop", "resize": 200}}},
            "data.augment.resize",
            "less than data.image_size",
        ),
        (
            {"dro": {"evaluate_on": "anchors"}, "objective": {"anchor_mode": "train"}},
            "dro.evaluate_on",
            "objective.anchor_mode=eval",
        ),
        (
            {"data": {"micro_batch_size": 2}, "model": {"head": {"output_norm": "batchnorm"}}},
            "data.micro_batch_size",
            "model.head.output_norm=batchnorm",
        ),
        (
            {"data": {"micro_batch_size": 2}, "model": {"head": {"norm": "batchnorm"}}},
            "data.micro_batch_size",
            "model.head.norm=batchnorm",
        ),
        ({"objective": {"bf16_products": True}}, "objective.bf16_products", "set deepspeed.bf16.enabled"),
        (
            {"objective": {"name": "gloria", "bf16_products": True}, "deepspeed": {"bf16": {"enabled": True}}},
            "objective.bf16_products",
            "is for ita and convirt",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "deepspeed.zero_optimization.stage", "0, 1, 2 or 3"),
        (
            {"deepspeed": {"zero_optimization": {"round_robin_gradients": True}}},
            "deepspeed.zero_optimization.round",
            "permutes",
        ),
        (
            {"deepspeed": {"bf16": {"enabled": True}, "fp16": {"enabled": True}}},
            "deepspeed.fp16.enabled",
            "contradicts",
        ),
        (
            {"deepspeed": {"bf16": {"enabled": True, "check_grad_overflow": False}}},
            "deepspeed.bf16.check",
            "not finite",
        ),
        ({"deepspeed": {"zero_optimization": {"compute_grad_norm": False}}}, "deepspeed.zero_optim", "not finite"),
        ({"deepspeed": {"tensorboard": {"enabled": True}}}, "deepspeed.tensorboard", "run.trackers: [tensorboard]"),
        ({"strategy": {"name": "fedavgg"}}, "strategy.name", "feddra"),
    ],
)
def test_each_contradiction_is_named(tree: dict, key: str, word: str) -> None:
    lines = problems(tree)
    assert len(lines) == 1, lines
    assert lines[0].startswith(key)
    assert word in lines[0]


def test_one_average_a_round_goes_with_a_single_stage() -> None:
    tree = {"schedule": {"stage1_steps": 0, "stage2_start": "global"}, "aggregate": {"after_stage1": False}}
    assert from_dict(merge(ROOT, tree)).schedule.stage2_start == "global"


def test_strategy_defaults_give_way_to_the_user() -> None:
    plain = from_dict(merge(ROOT, {"strategy": {"name": "fedavg"}}))
    assert (plain.dro.radius, plain.dro.center, plain.objective.anchor_weight) == (0, "samples", 0)
    uniform = from_dict(merge(ROOT, {"strategy": {"name": "fedavg"}, "dro": {"center": "uniform"}}))
    assert (uniform.dro.radius, uniform.dro.center) == (0, "uniform")
    assert (plain.schedule.stage1_steps, plain.schedule.stage2_steps) == (0, 70)
    mixed = from_dict(merge(ROOT, {"strategy": {"name": "fedavg"}, "schedule": {"stage1_steps": 20}}))
    assert (mixed.schedule.stage1_steps, mixed.schedule.stage2_steps, mixed.dro.radius) == (20, 70, 0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path) -> None:
    config = load(path)
    assert from_dict(yaml.safe_load(dump(config))) == config


def test_every_key_is_described() -> None:
    for key, info in known_keys().items():
        assert info.description, f"{key} has no docstring"


@pytest.mark.parametrize(("text", "word"), [(None, "cannot read"), ("a: [", "not YAML"), ("- 1", "sections of keys")])
def test_unreadable_files(tmp_path: Path, text: str | None, word: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        load(path)


def test_the_reference_is_up_to_date() -> None:
    from feddra_ds.config.reference import reference

    text = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    assert text == reference(class_of()), "run: feddra-ds config reference > docs/configuration.md"
