"""JSON and YAML that somebody else may have written: the one place that bounds their size and depth, and checks their fields.

Whatever is wrong raises ValueError with one line.
"""

from __future__ import annotations

import codecs
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from feddra_ds.common.text import printable, shown

T = TypeVar("T")

MAX_JSON_BYTES = 4 << 30  # an index of ten million pairs is a third of this
MAX_YAML_BYTES = 512 << 10  # PyYAML reads about so much in ten seconds
MAX_YAML_DEPTH = 32
MAX_YAML_NODES = 100_000  # with aliases written out, which make gigabytes of a few lines
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def parse_json(data: str | bytes, kind: TypeAdapter[T] = _ANYTHING, max_bytes: int = MAX_JSON_BYTES) -> T:
    """A JSON text as `kind` wants it, nothing converted; a depth above 200, text that is not UTF-8 and lone surrogates are
    no JSON. Raises ValueError, which names the first field that is wrong."""
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data)} bytes, more than {max_bytes}")
    if isinstance(data, bytes):
        data = data.removeprefix(codecs.BOM_UTF8)
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
    """YAML of plain values: keys are text or whole numbers, no tags, dates as text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth >= MAX_YAML_DEPTH:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"is nested deeper than {MAX_YAML_DEPTH}", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        for key in found:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise yaml.MarkedYAMLError(problem=f"the key {key} must be text; put it in quotes",
                                           problem_mark=node.start_mark)  # fmt: skip
        return found


class _TextLoader(_Loader):
    """Every value is text: yes and no stay words."""


_PLAIN = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]
_Loader.yaml_constructors = {
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in [*_PLAIN, None]},
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
}


_TextLoader.yaml_implicit_resolvers = {}


def parse_yaml(data: str | bytes, only_text: bool = False) -> Any:
    """A YAML text of plain values, or of text alone. Aliases (*name) count as what they stand for. Raises ValueError."""
    try:
        text = data if isinstance(data, str) else data.decode()
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"it has {len(text)} characters, more than {MAX_YAML_BYTES}")
        loader = (_TextLoader if only_text else _Loader)(text)
        try:
            node = loader.get_single_node()  # type: ignore[no-untyped-call]
            if node is None:
                return None
            _expanded(node, {})
            tree = loader.construct_document(node)  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
        _check_text(tree)
        return tree
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except UnicodeError as error:
        raise ValueError(f"its text is not UTF-8, or has characters that are none: {printable(str(error))}") from None
    except (TypeError, OverflowError, RecursionError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"a value cannot be read: {error}") from None


def _expanded(node: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for, aliases written out, and how deep they are. Raises yaml.YAMLError for too many."""
    if id(node) not in known:
        known[id(node)] = None  # until it is known: who meets it before that is within it
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        children = [part for pair in pairs for part in pair] or (
            node.value if isinstance(node, yaml.SequenceNode) else []
        )
        inside = [_expanded(child, known) for child in children]
        known[id(node)] = 1 + sum(n for n, _ in inside), 1 + max((depth for _, depth in inside), default=0)
    found = known[id(node)]
    if found is None:
        raise yaml.MarkedYAMLError(problem="an alias (*name) stands within what it names", problem_mark=node.start_mark)
    if found[0] > MAX_YAML_NODES or found[1] > MAX_YAML_DEPTH:
        what = f"{MAX_YAML_NODES} values" if found[0] > MAX_YAML_NODES else f"{MAX_YAML_DEPTH} levels"
        raise yaml.MarkedYAMLError(problem=f"with its aliases (*name) written out it has more than {what}",
                                   problem_mark=node.start_mark)  # fmt: skip
    return found


def _check_text(tree: Any) -> None:
    """Raises UnicodeEncodeError for text with lone surrogates, which no file could be written with."""
    if isinstance(tree, str):
        tree.encode()
    for child in [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_text(child)
