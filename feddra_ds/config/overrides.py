"""Config keys given on the command line: `--section.key value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feddra_ds.common.errors import ConfigError
from feddra_ds.common.parse import parse_yaml
from feddra_ds.common.tree import merge, set_path
from feddra_ds.config.deepspeed_file import read_deepspeed_file


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as a nested dict, values read as YAML; the last of a key wins.

    `--deepspeed FILE.json` stands for the file's keys, under the `--deepspeed.key value` beside it. Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    problems, items = [], list(arguments)
    while items:
        item = items.pop(0)
        key, equals, value = item.partition("=")
        if not key.startswith("--") or len(key) < 3:
            problems.append(f"{item}: is not an option; write --section.key value")
            continue
        if not equals:
            if not items or items[0].startswith("--"):
                problems.append(f"{key[2:]}: has no value; write {key} VALUE")
                continue
            value = items.pop(0)
        try:
            parsed = parse_yaml(value)
        except ValueError:
            parsed = value
        if isinstance(parsed, str) and _is_float(parsed):
            parsed = float(parsed)  # YAML 1.1 reads 1e-3 as text
        if key == "--deepspeed" and isinstance(parsed, str):
            tree["deepspeed"] = merge(read_deepspeed_file(parsed), tree.get("deepspeed", {}))
        else:
            set_path(tree, key[2:], parsed)
    if problems:
        raise ConfigError(problems)
    return tree


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text[:1] in "+-.0123456789"
