"""From elsewhere to disk: what data can come from (`SOURCES`), and how it becomes shards, is split and is dealt out."""

from __future__ import annotations

from importlib import import_module

from feddra_ds.data.sources.base import Source

# name: "module:Class". Imported only when asked for, so that a source may need packages that the others do not.
SOURCES = {"csv": "feddra_ds.data.sources.table:Table"}


def source_class(name: str) -> type[Source]:
    """The class of a source."""
    module, _, attribute = SOURCES[name].partition(":")
    found: type[Source] = getattr(import_module(module), attribute)
    return found
