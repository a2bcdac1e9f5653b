"""metrics.jsonl: one line a round."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from feddra_ds.common.files import write_atomic
from feddra_ds.common.parse import parse_json
from feddra_ds.federation.record import RoundRecord

_RECORD: TypeAdapter[Any] = TypeAdapter(RoundRecord)


class MetricsFile:
    """metrics.jsonl, one line a round; a resumed run drops the lines of rounds that it will repeat."""

    def __init__(self, path: Path, next_round: int, last: dict[str, Any] | None = None):
        """next_round: the first round that will be written; last: the line before it, where a kill kept it from the file."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["round"] < next_round]
        if last is not None and (not kept or kept[-1]["round"] < last["round"]):
            kept.append(last)
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: RoundRecord) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off mid-write is left out. Raises ValueError for another."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    given = path.read_bytes().splitlines()
    for number, text in enumerate(given, 1):
        try:
            lines.append(parse_json(text, _RECORD))
        except ValueError as error:
            if number < len(given):
                raise ValueError(f"{path}: line {number} is no round of a run: {error}") from error
    return lines
