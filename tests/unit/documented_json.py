"""Holds what a command prints with --json against its tables in docs/json_output.md."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[2] / "docs" / "json_output.md"
TYPES = {"text": str, "int": int, "float": (int, float), "bool": bool, "list": list, "any": object}


def documented(command: str) -> dict[str, str]:
    """path → type, braces written out, of a command's table."""
    (part,) = re.findall(rf"^## {command}\n(.*?)(?=^## |\Z)", SCHEMA.read_text(), re.M | re.S)
    out = {}
    for path, kind in re.findall(r"^\| `(.+?)` \| (\w+) \|", part, re.M):
        pieces = [
            re.split(r",", piece[1:-1]) if piece[0] == "{" else [piece] for piece in re.findall(r"{.*?}|[^{]+", path)
        ]
        out |= {"".join(chosen): kind for chosen in product(*pieces)}
    return out


def is_key(told: str, key: str) -> bool:
    """Whether a word of a documented path stands for a key."""
    return told.isupper() or re.fullmatch(re.escape(told).replace("@K", r"@(1|5|10)"), key) is not None


def seen_in(value: Any, paths: dict[str, list[str]], kinds: dict[str, str], place: str = "") -> set[str]:
    """The documented paths that occur in `value`; fails for what is not documented, or is of another type. paths: path → its
    words below this place."""
    if value is None or value == {}:
        return set()
    ends = [path for path, words in paths.items() if not words]
    if ends:
        assert isinstance(value, TYPES[kinds[ends[0]]]), place
        return set(ends)
    if isinstance(value, list):
        return set().union(*(seen_in(one, paths, kinds, place) for one in value))
    assert isinstance(value, dict), f"{place} is not documented as a value"
    out: set[str] = set()
    for key, below in value.items():
        literal = {path: words[1:] for path, words in paths.items() if not words[0].isupper() and is_key(words[0], key)}
        inside = literal or {path: words[1:] for path, words in paths.items() if words[0].isupper()}
        assert inside, f"{place}.{key} is not documented"
        out |= seen_in(below, inside, kinds, f"{place}.{key}")
    return out


def check_documented(command: str, *results: dict[str, Any], but: str) -> None:
    """All of the results is documented, and all that is documented occurs in them, but paths that match `but`."""
    kinds = documented(command)
    paths = {path: path.replace("[]", "").split(".") for path in kinds}
    seen = set().union(*(seen_in(json.loads(json.dumps(one, allow_nan=False)), paths, kinds) for one in results))
    assert sorted(path for path in set(kinds) - seen if not re.search(but, path)) == []
