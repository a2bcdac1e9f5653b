"""Loading and cross-checking the config: every problem is found, named by its key, and reported at once.

A config is YAML with `--section.key value` on top. Precedence, low to high: the defaults below, the strategy's
presets, the YAML file, the command line.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, create_model

from feddra_ds import objectives, strategies
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.parse import parse_yaml
from feddra_ds.common.section import Section
from feddra_ds.common.text import printable, shown
from feddra_ds.common.tree import get_path, merge
from feddra_ds.config.checks import contradictions
from feddra_ds.config.deepspeed_file import read_deepspeed_file
from feddra_ds.config.deepspeed_keys import known_deepspeed_keys, unknown_deepspeed_keys
from feddra_ds.config.schema import Config
from feddra_ds.config.shipped import find, names
from feddra_ds.objectives import Objective, ObjectiveOptions
from feddra_ds.strategies import Strategy, StrategyOptions


@functools.cache
def config_class(objective: type[ObjectiveOptions], strategy: type[StrategyOptions]) -> type[Config]:
    """The config with the keys of one objective and one strategy in their sections."""
    fields: dict[str, Any] = {
        "objective": (objective, Field(default_factory=objective)),
        "strategy": (strategy, Field(default_factory=strategy)),
    }
    return create_model("Config", __base__=Config, **fields)


def chosen(tree: dict[str, Any]) -> tuple[type[Objective], type[Strategy], list[str]]:
    """The objective and strategy that a tree names, and what is wrong with the names; the defaults where something is."""
    problems: list[str] = []
    classes: list[Any] = []
    defaults = (ObjectiveOptions().name, StrategyOptions().name)
    finders: Any = (objectives.find, strategies.find)
    for key, find_class, default in zip(("objective.name", "strategy.name"), finders, defaults, strict=True):
        try:
            classes.append(find_class(default if (name := get_path(tree, key)) is None else name))
        except ConfigError as error:
            problems += error.problems
            classes.append(find_class(default))
    return classes[0], classes[1], problems


def from_dict(user: dict[str, Any]) -> Config:
    """Validate a nested dict of what the user gave.

    Raises ConfigError with one line for each problem: unknown keys, bad values and contradictions alike.
    """
    objective, strategy, problems = chosen(user)
    tree = merge(strategy.presets, user)
    for line in problems:
        _prune(tree, line.partition(":")[0].split("."))
    kind = config_class(objective.Options, strategy.Options)
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        unnamed = {line.partition(".")[0] for line in problems}  # sections whose own keys are not known
        for item in error.errors():
            if item["type"] == "extra_forbidden" and item["loc"][0] in unnamed:
                _prune(tree, [str(part) for part in item["loc"]])
                continue
            key = printable(".".join(str(part) for part in item["loc"]))
            problems.append(
                f"{key}: {_message(item['type'], item['msg'].removeprefix('Value error, '), key, item['input'], kind)}"
            )
            _prune(tree, [str(part) for part in item["loc"]])
        try:
            config = kind.model_validate(tree)  # without the bad values, so that contradictions are found as well
        except ValidationError:  # a key that is no text cannot be left out by its name
            raise ConfigError(problems) from None
    problems += contradictions(config) + strategy(config.strategy, config.dro).problems(config)
    problems += _unknown_to_deepspeed(config)
    if problems:
        raise ConfigError(problems)
    return config


def load(path: str | Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file (a shipped config's name; or none) and put nested `overrides` on top. Raises ConfigError."""
    return from_dict(read_tree(path, overrides))


def class_of(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> type[Config]:
    """The config class of what a file and overrides name, whose keys are known_keys. Raises ConfigError."""
    objective, strategy, problems = chosen(read_tree(path, overrides))
    if problems:
        raise ConfigError(problems)
    return config_class(objective.Options, strategy.Options)


def read_tree(path: str | Path | None, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file (a shipped config's name; or none) with `overrides` on top, not validated. Raises ConfigError."""
    tree: Any = {}
    if path is not None:
        try:
            tree = parse_yaml(find(path).read_bytes()) or {}
        except FileNotFoundError as error:
            shipped = f"the configs that come with feddra_ds are {', '.join(names())}"
            raise ConfigError([f"--config: cannot read {path}: {error.strerror}; {shipped}"]) from error
        except OSError as error:
            raise ConfigError([f"--config: cannot read {path}: {error.strerror}"]) from error
        except ValueError as error:
            raise ConfigError([f"--config: {path} is not YAML: {error}"]) from error
        if not isinstance(tree, dict):
            raise ConfigError([f"--config: {path} must be sections of keys, got {type(tree).__name__}"])
        if isinstance(tree.get("deepspeed"), str):
            tree["deepspeed"] = read_deepspeed_file(tree["deepspeed"])
    return merge(tree, overrides or {})


def dump(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(section: type[Section] | None = None, prefix: str = "") -> dict[str, Any]:
    """Every key of the tree as `section.key` → its pydantic FieldInfo (type, default, description).

    section: a config class (config_class gives that of an objective and a strategy); None: that of the defaults.
    """
    section = section or class_of()
    out: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            out |= known_keys(info.annotation, f"{prefix}{name}.")
        else:
            out[prefix + name] = info
    return out


def _message(kind: str, text: str, key: str, value: Any, config: type[Config]) -> str:
    """What is wrong with `key`, from pydantic's kind of error and its text."""
    keys = list(known_keys(config))
    if kind == "extra_forbidden":
        return (
            f"unknown section{_or(_close(key, _sections(keys)))}"
            if isinstance(value, dict)
            else f"unknown key{_or(_nearest(key, keys))}"
        )
    if kind == "model_type":
        first = next(name for name in keys if name.startswith(f"{key}."))
        return f"is a section, whose keys are set one by one, such as {first} (got {shown(value)})"
    return f"{text.replace('Input should be', 'must be', 1)} (got {shown(value)})"


def _unknown_to_deepspeed(config: Config) -> list[str]:
    """A line per key of the section deepspeed that DeepSpeed would ignore, with what it may mean."""
    unknown = list(unknown_deepspeed_keys(config.deepspeed))
    if not unknown:
        return []
    known, lines = sorted(known_deepspeed_keys()), []
    for key in unknown:
        near = [f"deepspeed.{name}" for name in _nearest(key, known)]
        lines.append(f"deepspeed.{key}: DeepSpeed has no such key{_or(near) if near else '; remove it'}")
    return lines


def _nearest(key: str, keys: list[str]) -> list[str]:
    """The known keys that `key` may mean, best first: those of the same last part, else the one most alike."""
    leaf = key.rpartition(".")[2]
    same = [name for name in keys if name.rpartition(".")[2] == leaf]
    if same:
        return sorted(same, key=lambda name: -difflib.SequenceMatcher(None, key, name).ratio())
    leaves = {name.rpartition(".")[2]: name for name in reversed(keys)}
    whole, part = _close(key, keys), [leaves[name] for name in _close(leaf, list(leaves))]
    return whole or part if "." in key else part or whole


def _sections(keys: list[str]) -> list[str]:
    return sorted({name[:dot] for name in keys for dot in range(len(name)) if name[dot] == "."})


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
