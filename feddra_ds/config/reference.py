"""What the config classes say about every key: docs/configuration.md, `train --help`, and a JSON schema for editors."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args, get_origin

from feddra_ds import strategies
from feddra_ds.config.checks import REFUSED_DEEPSPEED_KEYS
from feddra_ds.config.load import known_keys
from feddra_ds.config.schema import Config


def json_schema(config: type[Config]) -> dict[str, Any]:
    """A JSON schema of a config file: every key with its type, bounds, default and meaning; no others are allowed."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **config.model_json_schema()}
    return schema | {"title": "A config of feddra_ds", "description": "Each key: `feddra-ds config reference`."}


def reference(config: type[Config]) -> str:
    """The configuration reference as Markdown, with the keys of the objective and strategy of a config class."""
    out = [
        "# Configuration reference",
        "",
        "Written from the config classes (`feddra-ds config reference > docs/configuration.md`); a test keeps it so.",
        "YAML sections of keys; `--section.key value` on the command line goes on top; `feddra-ds train --print_config` shows",
        "the resolved tree. Every problem of a config is reported at once, each with its key, before any process starts.",
    ]
    section = None
    keys = known_keys(config)
    for key, info in keys.items():
        head = key.split(".")[0]
        if head != section:
            section = head
            out += ["", f"## {section}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        out.append(_row(*_cells(key, info)))
    out += [
        "",
        "## What a strategy presets",
        "",
        "Keys that you give override these.",
        "",
        "| strategy | presets |",
        "|---|---|",
    ]
    for name in strategies.STRATEGIES:
        tree = strategies.find(name).presets
        presets = ", ".join(f"`{s}.{k} = {v}`" for s, keys in tree.items() for k, v in keys.items())
        out.append(f"| {name} | {presets or 'the defaults above'} |")
    out += [
        "",
        "## Keys of one strategy alone",
        "",
        "| strategy | key | type | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for name in strategies.STRATEGIES:
        own = strategies.find(name).Options
        for key, info in known_keys(own, "strategy.").items():
            if key not in keys:
                out.append(_row(name, *_cells(key, info)))
    out += ["", "## DeepSpeed keys that are refused", "", "| key | why, and what to do |", "|---|---|"]
    out += [f"| `deepspeed.{key}` | {advice} |" for key, advice in REFUSED_DEEPSPEED_KEYS.items()]
    return "\n".join(out) + "\n"


def kind_of(info: Any) -> str:
    """The type of a key, from its FieldInfo, with its bounds, for reading: `float, ≥ 0`; `adamw | sgd | muon`."""
    return _type(info.annotation) + _bounds(info)


def default_of(info: Any) -> str:
    """Its default as YAML has it."""
    default = info.get_default(call_default_factory=True)
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _cells(key: str, info: Any) -> tuple[str, str, str, str]:
    meaning = " ".join((info.description or "").split())
    return f"`{key}`", kind_of(info), f"`{default_of(info)}`", meaning


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    """An annotation for reading: what pydantic adds to a type stands in the bounds."""
    if get_origin(annotation) is list:
        return f"list[{_type(get_args(annotation)[0])}]"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"typing\.|NoneType", lambda m: "null" if m.group() == "NoneType" else "", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m.group(1).replace("'", "").replace(", ", " | "), text)
    return text.replace("None", "null")


def _bounds(info: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(m, name)}" for m in info.metadata for name, sign in signs.items() if hasattr(m, name)]
    return f", {', '.join(found)}" if found else ""
