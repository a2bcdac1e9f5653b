"""From a spec to its runs: arms × grid × seeds, each with an id and a fingerprint of all that decides its result."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import ConfigError
from feddra_ds.common.tree import merge, set_path
from feddra_ds.config.load import from_dict, read_tree
from feddra_ds.experiments.shipped import find_base
from feddra_ds.experiments.spec import Kind, Spec

_REFERENCE = re.compile(r"\{run:([^}]+)\}")


@dataclass(frozen=True)
class Run:
    """One training with its evaluation.

    id: arm and seed as a folder's name. keys: what the arm sets, by `section.key`. tree: the config but for the seed's
    own keys. needs: arms whose runs of the same seed come first. shuffled: whether the train texts are dealt to other images.
    fingerprint: of what decides the result.
    """

    id: str
    arm: str
    seed: int
    kind: Kind
    keys: dict[str, Any]
    tree: dict[str, Any]
    needs: tuple[str, ...]
    shuffled: bool
    fingerprint: str


@dataclass(frozen=True)
class Grid:
    """All runs of one kind of seeds. arms: the names in order. controls: arm → the arm of its shuffled texts.
    fingerprint: of all arms, without the seeds."""

    arms: tuple[str, ...]
    controls: dict[str, str]
    runs: tuple[Run, ...]
    fingerprint: str

    @property
    def needed(self) -> set[str]:
        """Arms whose runs others read."""
        return {name for run in self.runs for name in run.needs}


def expand(spec: Spec, path: str | Path, kind: Kind, only: Iterable[str] | None = None) -> Grid:
    """The runs, seed by seed, so that a part of them is a comparison already; every config is checked.

    path: of the spec, whose folder may hold the base. only: names of arms; None for all. Raises ConfigError, which names
    the arm.
    """
    seeds = getattr(spec.seeds, kind)
    if not seeds:
        raise ConfigError([f"seeds.{kind}: {path} names none"])
    arms = _arms(spec)
    controls = {name: f"{name}, shuffled" for name in arms} if spec.controls else {}
    problems = [f"arms: {name} is the name of a control" for name in controls.values() if name in arms]
    arms = {name: keys for arm, keys in arms.items() for name in filter(None, (arm, controls.get(arm)))}
    base = read_tree(find_base(spec.base, path))
    common = _tree(base, spec.common)
    trees = {name: _tree(common, keys) for name, keys in arms.items()}
    needs = {name: _needs(keys, arms) for name, keys in arms.items()}
    problems += [line for name in arms for line in _problems(name, trees[name], needs[name], arms)]
    if spec.baseline is not None and spec.baseline not in arms:
        problems.append(f"baseline: there is no arm {spec.baseline}; there are: {', '.join(arms)}")
    chosen = list(arms) if only is None else list(only)
    problems += [f"--arms: there is no arm {name}; there are: {', '.join(arms)}" for name in chosen if name not in arms]
    if problems:
        raise ConfigError(problems)
    order = _ordered(list(arms), needs, chosen)
    # where a table or dataset lies is no part of what it is; rows say it (Options.given)
    shared = {
        "data": spec.data.model_dump(mode="json", exclude={"path": True, "convert": {"csv"}}),
        "evaluate": spec.evaluate.model_dump(mode="json"),
    }
    shuffled = set(controls.values())
    prints = {
        name: _hash({"tree": trees[name], **shared} | ({"texts": "shuffled"} if name in shuffled else {}))
        for name in arms
    }
    for name in order:  # what an arm reads decides its result as well
        if needs[name]:
            prints[name] = _hash([prints[name], *(prints[other] for other in needs[name])])
    runs = [
        Run(_slug(f"{name}-seed{seed}"), name, seed, kind, arms[name], trees[name], needs[name], name in shuffled,
            _hash([prints[name], seed]))
        for seed in seeds
        for name in order
    ]  # fmt: skip
    return Grid(tuple(name for name in arms if name in order), controls, tuple(runs), _hash(prints))


def _arms(spec: Spec) -> dict[str, dict[str, Any]]:
    """Every arm with every combination of the grid; the name says the combination by the last parts of its keys."""
    out = {}
    for name, keys in (spec.arms or {"": {}}).items():
        for values in itertools.product(*spec.grid.values()):
            point = dict(zip(spec.grid, values, strict=True))
            told = [f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in point.items()]
            out[", ".join([name, *told] if name else told)] = {**keys, **point}
    return out


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tree(base: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Keys may be dotted, sections, or both."""
    tree = base
    for key, value in keys.items():
        layer: dict[str, Any] = {}
        set_path(layer, key, value)
        tree = merge(tree, layer)
    return tree


def _needs(keys: dict[str, Any], arms: dict[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_REFERENCE.findall(json.dumps(keys))))


def _problems(name: str, tree: dict[str, Any], needs: tuple[str, ...], arms: dict[str, Any]) -> list[str]:
    """What is wrong with an arm's config, each line with the arm's name."""
    unknown = [f"arm {name}: {{run:{other}}} names no arm" for other in needs if other not in arms or other == name]
    try:
        from_dict(merge(tree, {"data": {"root": "data"}}))
    except ConfigError as error:
        return unknown + [f"arm {name}: {problem}" for problem in error.problems]
    return unknown


def _ordered(names: list[str], needs: dict[str, tuple[str, ...]], chosen: list[str]) -> list[str]:
    """The chosen arms and what they need, what is needed first. Raises ConfigError for a circle."""
    out: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            raise ConfigError([f"arm {name}: its {{run:…}} lead back to itself"])
        for other in needs[name]:
            visit(other, (*way, name))
        if name not in out:
            out.append(name)

    for name in names:
        if name in chosen:
            visit(name, ())
    return out


def fill(tree: Any, folders: dict[str, str]) -> Any:
    """The tree with `{run:ARM}` replaced by that arm's folder."""
    if isinstance(tree, dict):
        return {key: fill(value, folders) for key, value in tree.items()}
    if isinstance(tree, list):
        return [fill(value, folders) for value in tree]
    return _REFERENCE.sub(lambda found: folders[found[1]], tree) if isinstance(tree, str) else tree


def _slug(name: str) -> str:
    """A folder's name; a short hash keeps apart what looks alike in it."""
    plain = re.sub(r"[^\w.=-]+", "_", name)
    return plain if plain == name else f"{plain}-{_hash(name)[:6]}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
