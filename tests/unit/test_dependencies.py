"""pyproject.toml declares what the package imports, and nothing without a reason; one version everywhere."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from feddra_ds import __version__

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
FILES = [path for folder in ("feddra_ds", "launch") for path in sorted((REPOSITORY / folder).rglob("*.py"))]

# Declared, and imported by a dependency instead of by us.
USED_BY_OTHERS = {
    "ninja": "DeepSpeed compiles its CPU kernels with it",
    "tensorboard": "accelerate's tracker writes events with it, through torch.utils.tensorboard",
}


def same(name: str) -> str:
    """A distribution's name, spelled in the one way that names are compared in."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


def declared(extra: str | None = None) -> set[str]:
    """The distributions that pyproject.toml declares, in an extra or without any."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {same(Requirement(line).name) for line in lines}


IMPORTED = {name: path for path in FILES for name in imports(path) - set(sys.stdlib_module_names) - {"feddra_ds"}}
INSTALLED = packages_distributions()


def distributions_of(package: str) -> set[str]:
    """The installed distributions that bring a top-level package; its own name where none does."""
    return {same(name) for name in INSTALLED.get(package, [package])}


USED = {name for package in IMPORTED for name in distributions_of(package)}


def test_what_is_imported_is_declared() -> None:
    known = set().union(declared(), *(declared(extra) for extra in PROJECT["optional-dependencies"] if extra != "dev"))
    missing = {name: str(path) for name, path in IMPORTED.items() if not distributions_of(name) & known}
    assert not missing, "pyproject.toml does not declare what these files import"


def test_what_is_declared_is_imported_or_has_a_reason() -> None:
    idle = (declared() | declared("gpu")) - USED - set(USED_BY_OTHERS)
    assert not idle, "pyproject.toml declares what nothing imports"


def test_every_reason_is_needed() -> None:
    assert set(USED_BY_OTHERS) <= declared() - USED


def test_one_version() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"]
    assert __version__ == PROJECT["version"] == cited
