"""MIMIC-CXR-JPG as it is downloaded: metadata, labels and split as tables, a picture a file, a report a study.

PATH/mimic-cxr-2.0.0-metadata.csv.gz       dicom_id, subject_id, study_id, ViewPosition, …
PATH/mimic-cxr-2.0.0-{chexpert,split}.csv.gz
PATH/files/p10/p10000032/s50414267/<dicom_id>.jpg
REPORTS/files/p10/p10000032/s50414267.txt  of MIMIC-CXR; REPORTS may be mimic-cxr-reports.zip
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from feddra_ds.common.errors import DataError
from feddra_ds.common.section import Section
from feddra_ds.data.sources.base import Row, Skip, Source, nearest
from feddra_ds.data.sources.records import split_name
from feddra_ds.data.sources.table import read_table

_KEYS = ("dicom_id", "subject_id", "study_id", "ViewPosition")


class MimicCxrOptions(Section):
    """Options of MIMIC-CXR-JPG."""

    reports: Path | None = None
    """Folder that has files/ with the reports, or mimic-cxr-reports.zip; null looks under --path."""
    views: str = "PA,AP"
    """ViewPositions to take, with commas between; `all` takes every picture."""
    labels: Literal["chexpert", "negbio", "none"] = "chexpert"
    """Whose labels to keep."""


class MimicCxr(Source):
    """Frontal pictures with the findings and impression of their study; the official split; a group a subject.

    client and site columns name columns of the metadata; without one all is one client, for `data partition` to deal out.
    """

    Options = MimicCxrOptions
    sections = ("findings", "impression")

    def rows(self) -> Iterator[Row | Skip]:
        """A Skip has no report, or a view that is not taken. Raises DataError where a table is missing or is another's."""
        metadata = self._table("metadata")
        assert metadata is not None
        columns = self.columns
        there = list(metadata.columns or ())
        wanted: list[tuple[str, str | None]] = [("--path", name) for name in _KEYS]
        wanted += [
            ("--client-column", columns.client),
            ("--site-column", columns.site),
            ("--group-column", columns.group),
        ]
        lost = [(option, name) for option, name in wanted if name and name not in there]
        if lost:
            raise DataError([f"{o}: {metadata.path} has no column {n}{nearest(n, there)}" for o, n in lost])
        labels, splits, report = self._labels(), self._splits(), self._reports()
        views = {view.strip().upper() for view in self.options.views.split(",")}
        for line, cells in metadata.records:
            if isinstance(cells, Skip):
                yield cells
                continue
            cells = {name: cell.strip() for name, cell in cells.items()}
            picture, subject, study, view = (cells[key] for key in _KEYS)
            if not (picture and subject and study):
                yield Skip(line, "no dicom_id, subject_id or study_id", file=metadata.name)
                continue
            if "ALL" not in views and view.upper() not in views:
                yield Skip(line, f"view {view or 'not told'}", picture, metadata.name, is_choice=True)
                continue
            folder = f"files/p{subject[:2]}/p{subject}/s{study}"
            text = report(f"{folder}.txt")
            if text is None:
                yield Skip(line, "no report", f"{folder}.txt", metadata.name)
                continue
            client = cells[columns.client] if columns.client else "all"
            if not client:
                yield Skip(line, "no client", picture, metadata.name)
                continue
            yield Row(
                line=line,
                image=f"{folder}/{picture}.jpg",
                text=text,
                client=client,
                group=cells[columns.group] if columns.group else subject,
                site=cells[columns.site] if columns.site else client,
                labels=labels.get(study, {}),
                file=metadata.name,
                split=splits.get(picture, ""),
            )

    def read_image(self, row: Row) -> bytes:
        """The picture's bytes; a .dcm of MIMIC-CXR where there is no .jpg. Raises OSError."""
        path = self.path / row.image
        dicom = path.with_suffix(".dcm")
        return (dicom if not path.exists() and dicom.exists() else path).read_bytes()

    def _table(self, what: str, needed: bool = True) -> Any:
        found = sorted([*self.path.glob(f"mimic-cxr*-{what}.csv"), *self.path.glob(f"mimic-cxr*-{what}.csv.gz")])
        if found:
            return read_table(found[-1], self.option)
        if needed:
            raise DataError(f"{self.option}: {self.path} has no mimic-cxr-2.0.0-{what}.csv or .csv.gz; it must be the folder "
                            "of MIMIC-CXR-JPG, which holds files/ too")  # fmt: skip
        return None

    def _labels(self) -> dict[str, dict[str, str | None]]:
        """{study: {label: 1, 0, -1 or None}}."""
        if self.options.labels == "none":
            return {}
        table = self._table(self.options.labels)
        out: dict[str, dict[str, str | None]] = {}
        names = [name for name in table.columns if name not in ("subject_id", "study_id")]
        unknown = [name for name in self.columns.labels if name not in names]
        if unknown or "study_id" not in table.columns:
            where = f"{table.path} has no column"
            raise DataError([f"--label-columns: {where} {n}{nearest(n, names)}" for n in unknown]
                            or f"{self.option}: {where} study_id")  # fmt: skip
        for _, cells in table.records:
            if not isinstance(cells, Skip):
                chosen = self.columns.labels or names
                out[cells["study_id"]] = {n: cells[n].strip().removesuffix(".0") or None for n in chosen}
        return out

    def _splits(self) -> dict[str, str]:
        """{dicom_id: split}; nothing where there is no such table, and the pairs are then split as a table's."""
        table = self._table("split", needed=False)
        if table is None:
            return {}
        if not {"dicom_id", "split"} <= set(table.columns):
            raise DataError(f"{self.option}: {table.path} has no columns dicom_id and split")
        return {c["dicom_id"]: split_name(c["split"]) for _, c in table.records if not isinstance(c, Skip)}

    def _reports(self) -> Callable[[str], str | None]:
        """A function from a report's place to its text, None where there is none."""
        given = self.options.reports
        places = [given] if given is not None else [
            p for name in ("mimic-cxr-reports", "mimic-cxr-reports.zip", ".") if (p := self.path / name).exists()
        ]  # fmt: skip
        place = places[0]
        if place.is_file():
            try:
                archive = zipfile.ZipFile(place)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"--source-option reports: cannot read {place}: {error}") from error
            names = set(archive.namelist())
            return lambda name: archive.read(name).decode(errors="replace") if name in names else None
        if not (place / "files").is_dir():
            raise DataError(f"--source-option reports: {place} has no folder files/, nor is it mimic-cxr-reports.zip")

        def read(name: str) -> str | None:
            path = place / name
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

        return read
