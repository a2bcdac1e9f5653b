"""The configs that come with the package: the files of configs/, which an installed package holds as data."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

_FOLDER = resources.files("feddra_ds") / "configs"


def names() -> list[str]:
    """Their names, sorted: file names without .yaml."""
    return sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))


def read(name: str) -> str:
    """The text of one. Raises FileNotFoundError."""
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def about(name: str) -> str:
    """The first line of its leading comment."""
    return read(name).partition("\n")[0].lstrip("# ")


def find(path: str | Path) -> Path | Traversable:
    """Where to read `path`: the file, or the shipped config of that name where there is no such file."""
    return _FOLDER / f"{path}.yaml" if not Path(path).is_file() and str(path) in names() else Path(path)
