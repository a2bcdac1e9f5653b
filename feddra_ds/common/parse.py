"""JSON that somebody else may have written: the one place that bounds its size and depth, and checks its fields.

Whatever is wrong raises ValueError with one line.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MAX_JSON_BYTES = 4 << 30  # an index of ten million pairs is a third of this
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


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor, or hide, as an escape: \\x1b, \\n, \\u202e, …"""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: object, most: int = _MAX_SHOWN) -> str:
    """A value for a message: its repr, printable and not too long."""
    text = printable(repr(value))
    return text if len(text) <= most else f"{text[:most]}…"
