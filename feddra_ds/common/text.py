"""Numbers, names and lists as words for people."""

from __future__ import annotations

import math
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def number(value: float | None) -> str:
    """Three figures after the point, fewer for large numbers; – for none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def decimals(value: float | None, places: int) -> str:
    """So many figures after the point; – for none."""
    return "–" if value is None else f"{value:.{places}f}"


def percent(value: float | None) -> str:
    """A share in %: one decimal below 10, none above; – for none."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if 0 < abs(value) < 0.0995 else f"{100 * value:.0f}"


def size(num_bytes: float) -> str:
    """Bytes for reading."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    power = min(3, int(math.log10(num_bytes) / 3))
    return f"{num_bytes / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def printable(text: str, keep: str = "") -> str:
    """The text with everything that could move a terminal's cursor, or hide, as an escape: \\x1b, \\n, \\u202e, …

    keep: characters that stay.
    """
    if text.isprintable():
        return text
    fine = lambda c: c.isprintable() or c in keep
    return "".join(c if fine(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: object, most: int = 120) -> str:
    """A value for a message: its repr, printable and of `most` characters."""
    text = printable(repr(value))
    return text if len(text) <= most else f"{text[:most]}…"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for one line, printable: the first `most`, and how many more there are."""
    rest = len(names) - most
    return ", ".join(map(printable, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """What an error says, as one line of at most 500 characters: its first, or its type where it says nothing or only a key."""
    said = str(error).strip()
    line = said.splitlines()[0] if said else ""
    text = printable(line if line and not isinstance(error, KeyError) else f"{type(error).__name__} {line}".strip())
    return text if len(text) <= 500 else f"{text[:500]}…"


def by_reason(excluded: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Ids of excluded clients by their reason, so that a slot that is lost is one line."""
    out: dict[str, list[str]] = {}
    for item in excluded:
        out.setdefault(item["reason"], []).append(item["id"])
    return out
