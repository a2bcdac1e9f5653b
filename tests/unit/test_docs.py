"""The documents name only what is there: files, modules, classes, config keys, make targets, links."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_house import LAYERS, PACKAGE

import feddra_ds
from feddra_ds import strategies
from feddra_ds.config.load import known_keys
from feddra_ds.federation import protocol

REPOSITORY = PACKAGE.parent
DOCUMENTS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
DOCUMENTS += [PACKAGE / "assets" / "VOCABULARY.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
OWN_CLASSES = REPOSITORY / "docs" / "own_classes.md"
SITE_HOOKS = REPOSITORY / "docs" / "site_hooks.py"
# names of the user's own in docs/own_classes.md, and places that an environment or a run has
NOT_OURS = (
    "hospital/",
    "hospital.",
    "my_",
    ".venv/",
    "RUN/",
    "runs/",
    "cxr/",
    "data/mine",
    "data/table",
    "results/NAME",
)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def code_of(document: Path) -> list[str]:
    """What stands in backticks or in a fenced block, block by block."""
    text = document.read_text(encoding="utf-8")
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.M | re.S)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


@each_document
def test_files_exist(document: Path) -> None:
    places = (REPOSITORY, PACKAGE, document.parent)
    missing = []
    for code in code_of(document):
        for name in re.findall(r"(?<![\w/.~-])[\w*-][\w./*-]*\.(?:py|md|yaml|toml|cff|csv|svg|png)\b", code):
            is_ours = "/" in name or name.endswith(".py") or name in ("constraints.txt",)
            if is_ours and not name.startswith(NOT_OURS) and not any(any(place.glob(name)) for place in places):
                missing.append(name)
    assert not missing


@each_document
def test_folders_exist(document: Path) -> None:
    tops = "|".join(["feddra_ds", "tests", "benchmarks", "configs", "launch", "docs", *LAYERS])
    missing = []
    for code in code_of(document):
        for name in re.findall(rf"(?<![\w/.-])(?:{tops})/(?:[\w-]+/)*(?![\w.*-])", code):
            if not name.startswith(NOT_OURS) and not any((place / name).is_dir() for place in (REPOSITORY, PACKAGE)):
                missing.append(name)
    assert not missing


@each_document
def test_dotted_names_exist(document: Path) -> None:
    for code in code_of(document):
        for name in re.findall(r"\bfeddra_ds(?:\.\w+)+", code):
            resolve(name)


def resolve(name: str) -> None:
    """Import the module that a dotted name begins with and look the rest up in it."""
    words = name.split(".")
    length = max(n for n in range(1, len(words) + 1) if is_module(words[:n]))
    found: Any = importlib.import_module(".".join(words[:length]))
    for word in words[length:]:
        assert hasattr(found, word) or word in getattr(found, "__annotations__", {}), f"{name}: there is no {word}"
        found = getattr(found, word, None)


def is_module(words: list[str]) -> bool:
    path = REPOSITORY.joinpath(*words)
    return path.is_dir() or path.with_suffix(".py").is_file()


@cache
def classes() -> dict[str, tuple[set[str], list[str]]]:
    """Every class of the package: its members, and the names of its bases."""
    out = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                targets = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
                targets += [t for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets]
                targets = [x for t in targets for x in (t.elts if isinstance(t, ast.Tuple) else [t])]
                members = {getattr(t, "id", getattr(t, "attr", "")) for t in targets}
                members |= {t.attr for n in ast.walk(node) if isinstance(n, ast.AnnAssign)
                            if isinstance(t := n.target, ast.Attribute)}  # fmt: skip
                members |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                out[node.name] = (members, [base.id for base in node.bases if isinstance(base, ast.Name)])
    return out


def has_member(name: str, member: str) -> bool:
    members, bases = classes().get(name, (set(), []))
    return member in members or any(has_member(base, member) for base in bases)


@each_document
def test_members_of_our_classes_exist(document: Path) -> None:
    missing = []
    for code in code_of(document):
        for name, member in re.findall(r"(?<![\w.])([A-Z]\w+)\.([a-z_]\w*)\b", code):
            if name in classes() and not has_member(name, member):
                missing.append(f"{name}.{member}")
    assert not missing


@each_document
def test_config_keys_exist(document: Path) -> None:
    keys = set(known_keys())
    for name in strategies.STRATEGIES:
        keys |= set(known_keys(strategies.find(name).Options, "strategy."))
    sections = {key.split(".")[0] for key in keys}
    unknown = []
    for code in code_of(document):
        for key in re.findall(rf"(?<![\w./])((?:{'|'.join(sections)})(?:\.[a-z_]\w*)+)(?![\w/(]|\.\w)", code):
            # model.adapter and deepspeed hold keys that are not declared one by one
            opens = any(key.startswith(f"{known}.") for known in keys) or key.startswith("deepspeed.")
            is_group = any(known.startswith(f"{key}.") for known in keys)
            if key not in keys and not opens and not is_group and key not in own_keys():
                unknown.append(key)
    assert not unknown


def own_keys() -> set[str]:
    """Keys of the user's own classes in docs/own_classes.md."""
    names = re.findall(r"^    (\w+): \w+ = Field", OWN_CLASSES.read_text(encoding="utf-8"), re.M)
    return {f"{section}.{name}" for section in ("objective", "strategy") for name in names}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = document.parent / path if path else document
        assert other.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@each_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", (REPOSITORY / "Makefile").read_text(), re.M))
    targets |= {"test-all"}  # declared beside test
    named = {name for code in code_of(document) for name in re.findall(r"(?:^|\s)make ([a-z-]+)", code)}
    assert named <= targets


def test_the_architecture_has_every_package_in_order() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    packages = {str(p.parent.relative_to(PACKAGE)) for p in PACKAGE.rglob("*/__init__.py")}
    assert not {name for name in packages if f"`{name}/`" not in text}
    assert " ".join(LAYERS) in " ".join(text.split())


def test_the_architecture_has_every_message() -> None:
    keys = re.findall(r"^    (\S+) +\S+ → ", protocol.__doc__ or "", re.M)
    assert len(keys) >= 5
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert not [key for key in keys if f"`{key}`" not in text]


def test_own_classes_are_those_that_are_tested() -> None:
    path = REPOSITORY / "tests" / "integration" / "test_own_classes.py"
    texts = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if node.targets[0].id in ("OBJECTIVE", "STRATEGY", "TRACKER")
    }
    blocks = re.findall(r"^```python\n(.*?)^```", OWN_CLASSES.read_text(encoding="utf-8"), re.M | re.S)
    tested = [texts[name] for name in ("OBJECTIVE", "STRATEGY", "TRACKER")]
    assert [ast.dump(ast.parse(code)) for code in blocks] == [ast.dump(ast.parse(code)) for code in tested]


def test_no_document_is_named_that_is_not_here() -> None:
    files = [p for top in ("benchmarks", "launch", "configs", "docs", "feddra_ds", "tests")
             for p in (REPOSITORY / top).rglob("*") if p.suffix in (".py", ".md", ".yaml")]  # fmt: skip
    there = {p.name for p in [*REPOSITORY.glob("*.md"), *files]} | set(beside_docs().values())
    for path in [*files, *DOCUMENTS, REPOSITORY / "Makefile"]:
        text = path.read_text(encoding="utf-8")
        assert not set(re.findall(r"\b([\w-]+\.md)\b", text)) - there, path
        # a word in capitals with a section number is a paper's name
        assert not re.findall(r"\b[A-Z]{6,} \d", text), path


class _Plain(yaml.SafeLoader):
    """mkdocs.yml, whose tags name functions of its extensions."""


_Plain.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)


def pages_of(nav: Any) -> list[str]:
    """The pages that a navigation names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def beside_docs() -> dict[str, str]:
    """BESIDE_DOCS of docs/site_hooks.py, which needs mkdocs when it is imported."""
    for node in ast.parse(SITE_HOOKS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BESIDE_DOCS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("docs/site_hooks.py has no BESIDE_DOCS")


def test_the_site_has_every_page_once() -> None:
    nav = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), _Plain)["nav"]
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")}
    pages |= {name for name in beside_docs().values() if name.endswith(".md")}
    assert sorted(pages_of(nav)) == sorted(pages)
    assert not [source for source in beside_docs() if not (REPOSITORY / source).is_file()]


def test_the_api_page_shows_what_is_public() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)", page, re.M)
    for name in shown:
        resolve(name)
    public = [f"{home}.{name}" for name, home in feddra_ds._HOMES.items()]
    assert set(public) <= set(shown)


@pytest.mark.exhaustive
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """`make docs`, where its extra is installed; .github/workflows/ci.yml builds it too."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "doc-heading" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
