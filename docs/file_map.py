"""docs/files.md, written from the modules' docstrings: `python docs/file_map.py > docs/files.md`."""

from __future__ import annotations

import ast
import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("feddra_ds", "launch", "tests", "benchmarks", "docs")
HEADER = """# Files, a line each

Written from the docstrings (`python docs/file_map.py > docs/files.md`); a test keeps it so. In `feddra_ds` a module imports
only from modules of lower layers; `tests/unit/test_house.py` has the layers.
"""


def file_map() -> str:
    """The page: a table per folder with the first sentence of each Python file."""
    names = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    paths = sorted(names, key=lambda path: (path.parent, path.name))
    lines = [HEADER]
    for folder, files in groupby(paths, key=lambda path: path.parent):
        rows = [f"| `{path.name}` | {said} |" for path in files if (said := first_sentence(ROOT / path))]
        if rows:
            lines += [f"## {folder}/", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def first_sentence(path: Path) -> str:
    """Of a module's docstring, as a table's cell; empty where it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[.!?])\s", " ".join(text.partition("\n\n")[0].split()))[0]
    return sentence.removesuffix(".").replace("|", "\\|")


if __name__ == "__main__":
    print(file_map(), end="")
