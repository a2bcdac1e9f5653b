"""The house rules that a machine can check: layering, imports, who may import deepspeed, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "feddra_ds"

# A package imports only from those to its left.
LAYERS = """
    common metrics distributed losses objectives strategies config data model engine checkpoint federation run
    evaluation report doctor experiments commands cli __main__
""".split()
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules of feddra_ds that a file imports: anywhere in it, or only when it is itself imported."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively; the house imports by full names"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layering(path: Path) -> None:
    own = module_of(path).split(".")[1]
    assert own in LAYERS, f"{own} has no place in LAYERS"
    others = {name.split(".")[1] for name in imports_of(path)} - {own}
    upwards = [name for name in others if LAYERS.index(name) > LAYERS.index(own)]
    assert not upwards, f"{path} imports {upwards}, which lie to the right of {own}"


def test_no_import_circle() -> None:
    graph = {name: imports_of(path, at_import=True) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - {name}):
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_every_package_says_its_rule(name: str) -> None:
    said = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    assert said, f"{name}/__init__.py says nothing"
    assert len(said) > 40


def test_report_and_doctor_do_not_know_each_other() -> None:
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] == "doctor":
            assert not [name for name in imports_of(path) if name.startswith("feddra_ds.report")], path


def test_metrics_import_only_the_libraries_they_need() -> None:
    for path in (PACKAGE / "metrics").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert foreign <= {"numpy", "scipy", "sklearn", "feddra_ds"}, f"{path} imports {foreign}"


def test_only_engine_imports_deepspeed() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "deepspeed" for name in names):
                assert path.parent.name == "engine", f"{path} imports deepspeed"


def run_imports(*steps: tuple[list[str], tuple[str, ...]]) -> None:
    """In one fresh process: import the modules of each step, after which none of its forbidden packages may be there."""
    code = (
        "import sys, importlib\n"
        f"for names, forbidden in {steps!r}:\n"
        "    for name in names: importlib.import_module(name)\n"
        "    bad = [m for m in sys.modules if m.split('.')[0] in forbidden]\n"
        "    if bad: sys.exit(f'{bad[:3]} came with one of {names}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_importing_imports() -> None:
    first = ["feddra_ds.run.train", "feddra_ds.run.checks"]  # what checks a run imports nothing slow
    light = [
        "cli", "config.load", "strategies.robust_weights", "distributed.topology", "engine.engine", "losses",
        "data.loading.client_data",
    ]  # fmt: skip
    run_imports(
        (first, ("torch", "transformers", "deepspeed", "scipy")),
        (["feddra_ds", *(f"feddra_ds.{name}" for name in light)], ("deepspeed", "triton")),
        # transformers' own modules import triton where it is installed, so only deepspeed is looked for here
        (sorted(set(MODULES) - {"feddra_ds.__main__"}), ("deepspeed",)),
    )
