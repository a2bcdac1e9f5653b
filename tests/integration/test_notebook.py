"""The notebook of examples/ runs from its first cell to its last, in a kernel of its own.

Too long for the slow tier; .github/workflows/ci.yml runs it by name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "examples" / "first_run.ipynb"

pytestmark = pytest.mark.exhaustive


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "clear the outputs before committing: they would not stay true"

    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()

    said = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    train, losses, galleries, reports = said[2:6]
    assert "round 5" in train, train
    assert losses.count(" p 0.") == 5 * 6, "five clients over six rounds"
    assert [line.split()[0] for line in galleries.splitlines()][-2:] == ["island_hospital", "all"], galleries
    assert galleries.count("chance ") >= 7, galleries
    assert len(reports.splitlines()) == 3, reports
    assert list(tmp_path.glob("feddra-*/run/report.html")), said[-1]
