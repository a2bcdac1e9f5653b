"""Open-i's Indiana University chest X-rays: a report an XML file, its pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from feddra_ds.common.errors import DataError
from feddra_ds.common.section import Section
from feddra_ds.data.sources.base import Row, Skip, Source
from feddra_ds.data.sources.table import read_table


class OpenIOptions(Section):
    """Options of Open-i's X-rays."""

    images: Path | None = None
    """Folder of the pictures; null looks in all folders under --path."""
    projections: Path | None = None
    """Table with the columns filename and projection; only its Frontal pictures are taken. null takes all pictures."""


class OpenI(Source):
    """A pair for each picture of a report: findings and impression, the report's MeSH terms as the label `mesh`.

    A report is a patient's only one, so it is the group. line: the report's place among the files, sorted by name.
    """

    Options = OpenIOptions
    sections = ("findings", "impression")
    unit = "picture"

    def rows(self) -> Iterator[Row | Skip]:
        """A Skip is an XML file that cannot be read, or has no picture, or a picture that is not frontal."""
        reports = sorted(self.path.rglob("*.xml"))
        if not reports:
            raise DataError(f"{self.option}: {self.path} has no .xml file; it must be the folder of Open-i's reports")
        folder = self.options.images or self.path
        places = {p.stem: p for kind in ("png", "jpg", "dcm") for p in folder.rglob(f"*.{kind}")}
        frontal = self._frontal()
        line = 0
        for path in reports:
            line += 1
            try:
                root = ElementTree.parse(path).getroot()
            except (OSError, ElementTree.ParseError) as error:
                yield Skip(line, "not XML", str(error), path.name)
                continue
            parts = [(p.get("Label") or "", "".join(p.itertext()).strip()) for p in root.iter("AbstractText")]
            text = "\n".join(f"{name}: {part}" for name, part in parts if part)
            mesh = [(one.text or "").partition("/")[0].strip() for one in root.iterfind(".//MeSH/major")]
            pictures = [image.get("id") or "" for image in root.iter("parentImage")]
            if not pictures or not text:
                yield Skip(line, "no picture" if text else "empty text", file=path.name)
            for picture in pictures if text else []:
                line += 1
                if picture not in places:
                    yield Skip(line, "no picture", picture, path.name)
                elif frontal is not None and not {picture, picture.partition("_")[2]} & frontal:
                    yield Skip(line, "view not frontal", picture, path.name, is_choice=True)
                else:
                    labels: dict[str, str | None] = {"mesh": "|".join(dict.fromkeys(filter(None, mesh))) or None}
                    yield Row(line, str(places[picture]), text, "all", path.stem, "all", labels, path.name)

    def read_image(self, row: Row) -> bytes:
        """The picture's bytes. Raises OSError."""
        return Path(row.image).read_bytes()

    def _frontal(self) -> set[str] | None:
        """Names of the frontal pictures, without ending; None where no table tells."""
        path = self.options.projections
        if path is None:
            return None
        table = read_table(path, "--source-option projections")
        if not {"filename", "projection"} <= set(table.columns or ()):
            raise DataError(f"--source-option projections: {path} has no columns filename and projection")
        return {
            cells["filename"].partition(".")[0]
            for _, cells in table.records
            if not isinstance(cells, Skip) and cells["projection"].strip().lower() == "frontal"
        }
