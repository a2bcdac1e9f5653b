"""One thing that `feddra-ds doctor` looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what, what was found, and what to do about it (`todo`, empty where nothing is wrong)."""

    level: Level
    what: str
    found: str
    todo: str = ""
