"""The specs that come with the package: the files of configs/experiments/."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

_FOLDER = resources.files("feddra_ds") / "configs" / "experiments"


def names() -> list[str]:
    """The specs that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir() if file.name.endswith(".yaml")
                  and file.name != "base.yaml")  # fmt: skip


def find(path: str | Path) -> Path | Traversable:
    """Where to read `path`: the file, or the shipped spec of that name where there is no such file."""
    return _FOLDER / f"{path}.yaml" if not Path(path).is_file() and str(path) in names() else Path(path)


def find_base(base: str, spec: str | Path) -> str | Path:
    """The config that `base` names: beside the spec, or what `--config` finds."""
    beside = _FOLDER if not Path(spec).is_file() else Path(spec).parent
    near = beside / base
    return Path(str(near)) if near.is_file() else base
