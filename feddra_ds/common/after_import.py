"""Doing something as soon as a module of another package is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(module: str, call: Callable[[], object]) -> None:
    """`call()` right after the first import of `module` in this process; at once where it has been imported already."""
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(module, call))


class _Watch(MetaPathFinder):
    """Finds nothing itself: where `module` is looked for, it has the others find it, and adds the call."""

    def __init__(self, module: str, call: Callable[[], object]):
        self.module, self.call = module, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            self.call()

        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec
