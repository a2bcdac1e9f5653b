"""Parquet as a source, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.data.sources.base import Skip, needed
from feddra_ds.data.sources.records import RecordFile, Records, data_files

_ROWS = 256  # read at a time; with images in them a batch has some hundred megabytes at most


class Parquet(Records):
    """A Parquet file, or a folder of them. An image cell is a path, the encoded image, or {bytes, path}; rows count from 1."""

    unit = "row"

    def files(self) -> Iterator[RecordFile]:
        """Its files. Raises DataError for a file that is no Parquet."""
        pyarrow = needed("pyarrow", "--from parquet", "parquet")
        parquet = needed("pyarrow.parquet", "--from parquet", "parquet")
        for path in data_files(self.path, self.option, (".parquet",)):
            try:
                with parquet.ParquetFile(path) as file:
                    names = list(file.schema_arrow.names)
                    wanted = [name for _, name in self.columns.given() if name in names]
                    yield RecordFile(path, names, self._records(file, sorted(set(wanted))))
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{self.option}: cannot read {path} as Parquet: {error}") from error

    def _records(self, file: Any, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        line = 0
        for batch in file.iter_batches(_ROWS, columns=wanted):
            for record in batch.to_pylist():
                line += 1
                yield line, record
