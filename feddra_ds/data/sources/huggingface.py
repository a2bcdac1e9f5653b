"""A dataset of Hugging Face's `datasets` as a source: on disk, or by its id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import DataError
from feddra_ds.common.text import listed
from feddra_ds.data.sources.base import Row, Skip, needed
from feddra_ds.data.sources.records import RecordFile, RecordOptions, Records, split_name


class HuggingFaceOptions(RecordOptions):
    """Options of a dataset of `datasets`."""

    name: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str | None = None
    """The only split to take; null takes all, each as a split of its own."""
    revision: str | None = None
    """Commit or tag, for an id."""


class HuggingFace(Records):
    """A folder that save_to_disk wrote, a folder of data files, or an id, whose rows are streamed. No code of a dataset runs.

    Splits named train, validation and test stay as they are; a dataset with the split train alone is split as a table is.
    """

    Options = HuggingFaceOptions
    unit = "row"

    def files(self) -> Iterator[RecordFile]:
        """One for each split. Raises DataError where there is no such dataset, configuration or split."""
        datasets = needed("datasets", "--from huggingface", "huggingface")
        parts = self._open(datasets)
        wanted = self.options.split
        if wanted is not None and wanted not in parts:
            raise DataError(
                f"--source-option split: {self.path} has no split {wanted}; there are: {listed(list(parts))}"
            )
        chosen = parts if wanted is None else {wanted: parts[wanted]}
        for name, part in chosen.items():
            features = part.features or {}
            if isinstance(part, datasets.IterableDataset):
                part = part.decode(False)  # the encoded bytes are kept as they are
            for column, feature in part.features.items() if isinstance(part, datasets.Dataset) else ():
                if isinstance(feature, datasets.Image):
                    part = part.cast_column(column, datasets.Image(decode=False))
            given = {column for _, column in self.columns.given()}
            if features and given <= set(features):
                part = part.select_columns(sorted(given))
            split = split_name(name) if len(chosen) > 1 else ""
            yield RecordFile(self.path / name, list(features) or None, _records(part, features, datasets), split)

    def read_image(self, row: Row) -> bytes:
        """The file's bytes, of a dataset at the hub through its cache. Raises OSError and ValueError."""
        if not row.image.startswith("hf://"):
            return super().read_image(row)
        hub = needed("huggingface_hub", "--from huggingface", "huggingface")
        hub.utils.disable_progress_bars()  # of which there would be one for each picture
        try:
            at = hub.HfFileSystem().resolve_path(row.image)
            file = hub.hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)
        except Exception as error:  # the hub and httpx raise many types
            raise OSError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
        return Path(file).read_bytes()

    def _open(self, datasets: Any) -> dict[str, Any]:
        """{split: dataset}; a dataset without splits is under ""."""
        path = self.path
        on_disk = [path / name for name in ("dataset_dict.json", "state.json") if (path / name).is_file()]
        try:
            if on_disk:
                found = datasets.load_from_disk(str(path))
            else:
                streaming = not path.exists()  # an id
                found = datasets.load_dataset(
                    str(path), self.options.name, revision=self.options.revision, streaming=streaming
                )
        except Exception as error:  # datasets, the hub and pyarrow raise many types for "not there"
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = "; is this machine online? A folder that save_to_disk wrote needs no network" * (
                isinstance(error, ConnectionError)
            )
            raise DataError(f"{self.option}: cannot open {path} with datasets: {first}{hint}") from error
        return dict(found) if isinstance(found, dict) else {"": found}


def _records(part: Any, features: dict[str, Any], datasets: Any) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
    classes = {name: f for name, f in features.items() if isinstance(f, datasets.ClassLabel)}
    for line, record in enumerate(part, 1):
        for name, feature in classes.items():
            value = record.get(name)
            if isinstance(value, int):
                record[name] = feature.int2str(value) if value >= 0 else None
        yield line, record
