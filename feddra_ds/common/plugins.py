"""The doors of the package: a class by the name of a table's row, or by `package.module:Class` of the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import TypeVar

from feddra_ds.common.errors import ConfigError

T = TypeVar("T")


def find_class(key: str, name: object, table: Mapping[str, str], base: type[T]) -> type[T]:
    """The class that the config key `key` names: a row of `table` (name → "module:Class"), or a path of that form.

    Raises ConfigError, with the key, where there is no such row, module or class, or the class is no subclass of `base`.
    """
    if not isinstance(name, str):
        raise ConfigError([f"{key}: must be a name or package.module:Class (got {name!r})"])
    if name not in table and ":" not in name:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            [f"{key}: {hint}there are {', '.join(table)}, and package.module:Class for your own (got {name!r})"]
        )
    path = table.get(name, name)
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise ConfigError([f"{key}: {path}: {error}; is its folder on PYTHONPATH?"]) from error
    except AttributeError as error:
        raise ConfigError([f"{key}: {path}: {module_name} has no class {class_name!r}"]) from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise ConfigError([f"{key}: {path} cannot be imported: {type(error).__name__}: {error}"]) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError([f"{key}: {path} must be a subclass of {base.__module__}.{base.__name__}"])
    return found
