"""From elsewhere to disk: what data can come from (`SOURCES`), and how it becomes shards, is split and is dealt out."""

from __future__ import annotations

from feddra_ds.common.plugins import find_class
from feddra_ds.data.sources.base import Source

# name: "module:Class". Imported only when asked for, so that a source may need packages that the others do not.
SOURCES = {
    "csv": "feddra_ds.data.sources.table:Table",
    "tsv": "feddra_ds.data.sources.table:Table",
    "jsonl": "feddra_ds.data.sources.json_lines:JsonLines",
    "parquet": "feddra_ds.data.sources.parquet:Parquet",
    "excel": "feddra_ds.data.sources.excel:Excel",
    "huggingface": "feddra_ds.data.sources.huggingface:HuggingFace",
    "mimic_cxr": "feddra_ds.data.sources.mimic_cxr:MimicCxr",
    "openi": "feddra_ds.data.sources.openi:OpenI",
}


def source_class(name: str) -> type[Source]:
    """The class of a source: of a row, or package.module:Class for one's own. Raises ConfigError with the key --from."""
    return find_class("--from", name, SOURCES, Source)  # type: ignore[type-abstract]
