"""MkDocs hooks: files beside docs/ are pages too, and links between all of them are written as a code host needs them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
# a file of the repository: its name on the site
BESIDE_DOCS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "feddra_ds/assets/VOCABULARY.md": "vocabulary.md",
    "examples/first_run.ipynb": "first_run.ipynb",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, name in BESIDE_DOCS.items():
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they lead in the repository → links as they lead on the site."""
    name = page.file.src_uri
    source = next((source for source, other in BESIDE_DOCS.items() if other == name), f"docs/{name}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return f"]({BESIDE_DOCS.get(target, posixpath.relpath(target, 'docs'))}{link[2] or ''})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)", on_site, markdown)
