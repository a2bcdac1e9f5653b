"""JSON lines as a source: one object a line."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.parse import parse_json
from feddra_ds.data.sources.base import Skip
from feddra_ds.data.sources.records import RecordFile, Records, data_files


class JsonLines(Records):
    """A file of JSON objects, one a line, or a folder of such files (.jsonl, .ndjson, .gz too); UTF-8.

    A field within an object is named with dots: `study.patient`.
    """

    def files(self) -> Iterator[RecordFile]:
        """Its files. Raises DataError for a file that cannot be read."""
        for path in data_files(self.path, self.option, (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
            yield RecordFile(path, None, self._records(path))

    def _records(self, path: Path) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        nested = [name for _, name in self.columns.given() if "." in name]
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for line, data in enumerate(file, 1):
                    if not data.strip():
                        continue
                    try:
                        record: Any = parse_json(data)
                    except ValueError as error:
                        yield line, Skip(line, "not JSON in UTF-8", str(error), path.name)
                        continue
                    if not isinstance(record, dict):
                        yield line, Skip(line, "not a JSON object", file=path.name)
                        continue
                    for name in nested:
                        if name not in record and (found := _within(record, name)) is not None:
                            record[name] = found
                    yield line, record
        except (OSError, EOFError) as error:
            raise DataError(f"{self.option}: cannot read {path}: {error}") from error


def _within(record: dict[str, Any], name: str) -> Any:
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
