"""Loading and cross-checking the config: every problem is found, named by its key, and reported at once.

A config is YAML with `--section.key value` on top. Precedence, low to high: the defaults below, the strategy's
defaults (`STRATEGY_DEFAULTS`), the YAML file, the command line.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .config_sections import (
    AggregateConfig,
    AugmentConfig,
    CheckpointConfig,
    ClientsConfig,
    Config,
    DataConfig,
    DroConfig,
    EncoderConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    Section,
    StrategyConfig,
    StreamingConfig,
    TextEncoderConfig,
    TopologyConfig,
)

__all__ = [
    "STRATEGY_DEFAULTS",
    "AggregateConfig",
    "AugmentConfig",
    "CheckpointConfig",
    "ClientsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DroConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "HeadConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "StrategyConfig",
    "StreamingConfig",
    "TextEncoderConfig",
    "TopologyConfig",
    "contradictions",
    "dump",
    "from_dict",
    "get_path",
    "known_keys",
    "load",
    "merge",
    "set_path",
]


class ConfigError(ValueError):
    """One or more problems of a config, each a line `key: what is wrong and what to do`."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


# Config defaults of each strategy; what it *does* differently is in strategies/.
STRATEGY_DEFAULTS: dict[str, dict[str, Any]] = {
    "feddra": {},
    "fedavg": {
        "dro": {"radius": 0.0},
        "objective": {"anchor_weight": 0.0},
        "schedule": {"stage1_steps": 0, "stage2_steps": 70},
    },
    "local": {
        "dro": {"radius": 0.0},
        "objective": {"anchor_weight": 0.0},
        "schedule": {"stage1_steps": 0, "stage2_steps": 70},
    },
    "centralized": {
        "dro": {"radius": 0.0},
        "objective": {"anchor_weight": 0.0},
        "schedule": {"stage1_steps": 0, "stage2_steps": 70},
    },
}

# Fragments that would break the federation silently: (path, what to do instead).
REFUSED_FRAGMENT_KEYS: dict[str, str] = {
    "scheduler": "overwrites the stage's learning rates, unfreezing the backbone; use schedule.warmup_rounds and schedule.decay",
    "optimizer": "set the optimizer section instead: stages need its two parameter groups",
    "zero_optimization.round_robin_gradients": "permutes the partitions that peers average; remove it",
    "tensorboard": "would write once per slot; use run.monitor",
    "wandb": "would write once per slot; use run.monitor",
    "csv_monitor": "would write once per slot; use run.monitor",
    "comet": "would write once per slot; use run.monitor",
    "train_batch_size": "set data.batch_size",
    "train_micro_batch_size_per_gpu": "set data.batch_size and data.micro_batch_size",
    "gradient_accumulation_steps": "set data.micro_batch_size",
}


def get_path(tree: dict[str, Any], dotted: str) -> Any:
    """The value at `a.b.c` of nested dicts, or None."""
    node: Any = tree
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def set_path(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dicts, creating what lies between."""
    *parents, leaf = dotted.split(".")
    for part in parents:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, section by section; neither is changed."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        out[key] = (
            merge(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict)
            else copy.deepcopy(value)
        )
    return out


def from_dict(user: dict[str, Any]) -> Config:
    """Validate a nested dict of what the user gave.

    Raises ConfigError with one line for each problem: unknown keys, bad values and contradictions alike.
    """
    strategy = get_path(user, "strategy.name") or "feddra"
    tree = merge(STRATEGY_DEFAULTS.get(strategy, {}), user)
    problems: list[str] = []
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            problems.append(f"{key}: {_message(item['type'], item['msg'], key, item['input'])}")
            _prune(tree, [str(part) for part in item["loc"]])
        config = Config.model_validate(tree)  # without the bad values, so that contradictions are found as well
    problems += contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def load(path: str | Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file (or none) and put nested `overrides` on top. Raises ConfigError."""
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError([f"--config: cannot read {path}: {error.strerror}"]) from error
        except yaml.YAMLError as error:
            raise ConfigError([f"--config: {path} is not YAML: {' '.join(str(error).split())}"]) from error
        if not isinstance(tree, dict):
            raise ConfigError([f"--config: {path} must be sections of keys, got {type(tree).__name__}"])
    return from_dict(merge(tree, overrides or {}))


def dump(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def contradictions(config: Config) -> list[str]:
    """Problems between keys, each valid on its own. One line each, the key first."""
    c, out = config, []
    if c.data.root is None:
        out.append("data.root: is needed; a folder that `feddra-ds data convert` or `feddra-ds data synth` wrote")
    if c.schedule.stage1_steps + c.schedule.stage2_steps == 0:
        out.append("schedule.stage2_steps: both stages have 0 steps, so nothing would train")
    if c.schedule.warmup_rounds >= c.schedule.rounds:
        out.append(
            f"schedule.warmup_rounds: {c.schedule.warmup_rounds} leaves none of the {c.schedule.rounds} rounds after the warm-up"
        )
    if c.clients.ids is not None:
        if not c.clients.ids:
            out.append("clients.ids: is empty; null takes all clients under data.root")
        repeated = sorted({i for i in c.clients.ids if c.clients.ids.count(i) > 1})
        if repeated:
            out.append(f"clients.ids: {', '.join(repeated)} named more than once")
        if c.clients.minimum > max(1, len(c.clients.ids)):
            out.append(
                f"clients.minimum: {c.clients.minimum} is more than the {len(c.clients.ids)} clients in clients.ids"
            )
    if c.data.micro_batch_size is not None and c.model.head.norm == "batchnorm":
        out.append(
            "data.micro_batch_size: splits the batch that model.head.norm=batchnorm takes statistics over; use layernorm"
        )
    weights = c.dro.fixed_weights
    if weights is not None:
        if min(weights, default=-1.0) < 0 or abs(sum(weights) - 1) > 1e-6:
            out.append(f"dro.fixed_weights: must be ≥ 0 and sum to 1, got {weights}")
        if c.clients.ids is not None and len(weights) != len(c.clients.ids):
            out.append(f"dro.fixed_weights: {len(weights)} weights for {len(c.clients.ids)} clients")
    if c.dro.evaluate_on == "anchors":
        if c.objective.anchor_weight == 0 or c.schedule.stage1_steps == 0:
            out.append("dro.evaluate_on: anchors needs objective.anchor_weight > 0 and schedule.stage1_steps > 0")
        if not c.aggregate.after_stage1:
            out.append(
                "dro.evaluate_on: anchors moves p at the aggregation after stage 1, so aggregate.after_stage1 must be true"
            )
        if c.data.batch_size < c.dro.evaluation_batch_size:
            out.append(
                f"dro.evaluation_batch_size: {c.dro.evaluation_batch_size} is more than data.batch_size = {c.data.batch_size}, "
                "whose batches dro.evaluate_on=anchors reads the losses off"
            )
        if c.dro.apply != "aggregate":
            out.append(f"dro.evaluate_on: anchors gives p too late for dro.apply={c.dro.apply}; use sample")
    for name, encoder in (("vision", c.model.vision), ("text", c.model.text)):
        if encoder.pretrained is not None and encoder.config is not None:
            out.append(f"model.{name}.config: contradicts model.{name}.pretrained; give one of them")
    for path, advice in REFUSED_FRAGMENT_KEYS.items():
        if get_path(c.deepspeed, path) not in (None, False):
            out.append(f"deepspeed.{path}: {advice}")
    stage = get_path(c.deepspeed, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        out.append(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, got {stage!r}")
    if get_path(c.deepspeed, "bf16.enabled") and get_path(c.deepspeed, "fp16.enabled"):
        out.append("deepspeed.fp16.enabled: contradicts deepspeed.bf16.enabled; give one of them")
    return out


def known_keys(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the tree as `section.key` → its pydantic FieldInfo (type, default, description)."""
    out: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            out |= known_keys(info.annotation, f"{prefix}{name}.")
        else:
            out[prefix + name] = info
    return out


def _message(kind: str, text: str, key: str, value: Any) -> str:
    """What is wrong with `key`, from pydantic's kind of error and its text."""
    if kind == "extra_forbidden":
        return (
            f"unknown section{_or(_close(key, _sections()))}"
            if isinstance(value, dict)
            else f"unknown key{_or(_nearest(key))}"
        )
    if kind == "model_type":
        first = next(name for name in known_keys() if name.startswith(f"{key}."))
        return f"is a section, whose keys are set one by one, such as {first} (got {value!r})"
    return f"{text.replace('Input should be', 'must be', 1)} (got {value!r})"


def _nearest(key: str) -> list[str]:
    """The known keys that `key` may mean, best first: those of the same last part, else the one most alike."""
    keys, leaf = list(known_keys()), key.rpartition(".")[2]
    same = [name for name in keys if name.rpartition(".")[2] == leaf]
    if same:
        return sorted(same, key=lambda name: -difflib.SequenceMatcher(None, key, name).ratio())
    leaves = {name.rpartition(".")[2]: name for name in reversed(keys)}
    whole, part = _close(key, keys), [leaves[name] for name in _close(leaf, list(leaves))]
    return whole or part if "." in key else part or whole


def _sections() -> list[str]:
    return sorted({name[:dot] for name in known_keys() for dot in range(len(name)) if name[dot] == "."})


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.6)


def _or(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names[:3])}?" if names else "; `feddra-ds train --help` lists all keys"


def _prune(tree: dict[str, Any], loc: list[str]) -> None:
    """Remove the deepest dict entry on the way to `loc` (a list's bad item removes the list)."""
    node: Any = tree
    for depth, part in enumerate(loc):
        child = node.get(part) if isinstance(node, dict) else None
        if depth == len(loc) - 1 or not isinstance(child, dict):
            if isinstance(node, dict):
                node.pop(part, None)
            return
        node = child
