"""A comparison as one HTML page: its tables, and a picture of each metric."""

from __future__ import annotations

import time

from markupsafe import Markup

from feddra_ds import __version__
from feddra_ds.experiments.compare import Comparison, crashed_in_words, tables
from feddra_ds.experiments.plot import draw
from feddra_ds.report.page import filled


def render(found: Comparison, name: str) -> str:
    """The page of an experiment's rows; no scripts, no network."""
    drawn = [metric for metric in found.metrics if any(of == metric for _, of in found.cells)]
    values = {
        "name": name,
        "tables": tables(found),
        "crashed": crashed_in_words(found),
        "pictures": [Markup(draw(found, metric)) for metric in drawn],
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
    }
    return filled("experiment.html.j2", values)
