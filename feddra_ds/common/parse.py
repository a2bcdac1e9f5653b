"""JSON and YAML that somebody else may have written: the one place that bounds their size and depth, and checks their fields.

Whatever is wrong raises ValueError with one line.
"""

from __future__ import annotations

from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MAX_JSON_BYTES = 4 << 30  # an index of ten million pairs is a third of this
MAX_YAML_BYTES = 512 << 10  # PyYAML reads about so much in ten seconds
MAX_YAML_DEPTH = 32
_MAX_SHOWN = 120  # characters of a value in a message
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def parse_json(data: str | bytes, kind: TypeAdapter[T] = _ANYTHING, max_bytes: int = MAX_JSON_BYTES) -> T:
    """A JSON text as `kind` wants it, nothing converted; a depth above 200, text that is not UTF-8 and lone surrogates are
    no JSON. Raises ValueError, which names the first field that is wrong."""
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data)} bytes, more than {max_bytes}")
    try:
        return kind.validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    except UnicodeError:  # of a str with lone surrogates
        raise ValueError("its text has characters that are none") from None


def check_fields(value: object, kind: TypeAdapter[T]) -> T:
    """What was parsed already, as `kind` wants it. Raises ValueError, which names the first field that is wrong."""
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def _first(error: ValidationError) -> str:
    item = error.errors(include_url=False, include_context=False)[0]
    said = item["msg"].replace("Input should be", "must be", 1)
    where = printable(".".join(str(part) for part in item["loc"]))
    got = "" if item["type"] in ("json_invalid", "missing") else f" (got {shown(item['input'])})"
    return f"{where}: {said}{got}" if where else f"{said}{got}"


class _Loader(yaml.SafeLoader):
    """YAML of plain values: text keys, no aliases (which make gigabytes of a few lines), no tags, dates as text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read here; write the value out",
                                       problem_mark=event.start_mark)  # fmt: skip
        if self.depth >= MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"is nested deeper than {MAX_YAML_DEPTH}", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        for key in found:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"the key {key} must be text; put it in quotes",
                                           problem_mark=node.start_mark)  # fmt: skip
        return found


_PLAIN = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]
_Loader.yaml_constructors = {
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in [*_PLAIN, None]},
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
}


def parse_yaml(data: str | bytes) -> Any:
    """A YAML text of plain values. Raises ValueError."""
    try:
        text = data if isinstance(data, str) else data.decode()
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"it has {len(text)} characters, more than {MAX_YAML_BYTES}")
        loader = _Loader(text)
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
        _check_text(tree)
        return tree
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except UnicodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason}") from None
    except (TypeError, OverflowError, RecursionError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"a value cannot be read: {error}") from None


def _check_text(tree: Any) -> None:
    """Raises UnicodeEncodeError for text with lone surrogates, which no file could be written with."""
    if isinstance(tree, str):
        tree.encode()
    for child in [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_text(child)


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor, or hide, as an escape: \\x1b, \\n, \\u202e, …"""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: object, most: int = _MAX_SHOWN) -> str:
    """A value for a message: its repr, printable and not too long."""
    text = printable(repr(value))
    return text if len(text) <= most else f"{text[:most]}…"
