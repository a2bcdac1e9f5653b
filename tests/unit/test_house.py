"""The house rules that a machine can check: layering, imports, who may import deepspeed, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "feddra_ds"

# A module imports only from modules above it; a folder is one line, its files import each other freely but acyclically.
LAYERS = """
    config_sections config config_reference logs dro schedule topology collectives losses data
    weights towers encoders heads dual_encoder interchange model adapters processing export from_config
    objectives extensions masters engine compression aggregate adapter_sum steps client strategies server ranking evaluate
    checkpoint restore
    coordinator display progress rounds resume build train
    run_files labels inference measures charts examples report_tables report_contents
    evaluate_command export_command probe report status
    memory selftest doctor_system doctor_config doctor_plan doctor cli __main__
""".split()


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Modules of feddra_ds that a file imports, anywhere in it (TYPE_CHECKING included)."""
    package = ["feddra_ds", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} if name == "feddra_ds" else {name}
    return {name.split(".")[1] for name in found if name.startswith("feddra_ds.")}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layering(path: Path) -> None:
    own = module_of(path)
    assert own in LAYERS, f"{own} has no place in LAYERS"
    known = [name for name in imports_of(path) if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()]
    upwards = [name for name in known if name != own and LAYERS.index(name) >= LAYERS.index(own)]
    assert not upwards, f"{path.name} imports {upwards}, which lie below it"


def test_only_engine_imports_deepspeed() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "deepspeed" for name in names):
                assert path.name == "engine.py", f"{path} imports deepspeed"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 330


def run_imports(names: list[str], forbidden: tuple[str, ...]) -> None:
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"bad = [m for m in sys.modules if m.split('.')[0] in {forbidden!r}]\n"
        "print(bad[:3]); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_imports_neither_deepspeed_nor_triton() -> None:
    light = ["cli", "config", "dro", "topology", "engine", "losses", "data.pipeline"]
    run_imports(["feddra_ds", *(f"feddra_ds.{name}" for name in light)], ("deepspeed", "triton"))


def test_no_module_imports_deepspeed_by_itself() -> None:
    # transformers' own modules import triton where it is installed, so only deepspeed is looked for here
    run_imports([f"feddra_ds.{name}" for name in sorted({module_of(p) for p in FILES} - {"__main__"})], ("deepspeed",))


def test_the_file_map_is_that_of_the_files() -> None:
    root = PACKAGE.parent
    done = subprocess.run(
        [sys.executable, root / "docs/file_map.py"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == (root / "docs/files.md").read_text(encoding="utf-8"), (
        "run: python docs/file_map.py > docs/files.md"
    )
