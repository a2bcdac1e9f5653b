"""The base of every section of the config, and what a key can say of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys with types, defaults and a docstring each; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


# For Field(json_schema_extra=MAY_CHANGE): a run may go on with another value, because it does not change the mathematics.
MAY_CHANGE: dict[str, Any] = {"may_change_on_resume": True}


def may_change_in(*free: str, but: Sequence[str] = ()) -> dict[str, Any]:
    """As MAY_CHANGE, for a key whose value is a dict: these of its own dotted keys, with what is below, but those."""
    return {"may_change_on_resume": list(free), "but": list(but)}


def may_change(info: Any, path: str = "") -> bool:
    """Whether a key, given by its pydantic FieldInfo, may differ between a checkpoint and the run that goes on from it.

    path: what in the key's value differs, where that is a dict ("" for all of it).
    """
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    free = extra.get("may_change_on_resume")
    if not isinstance(free, list):
        return bool(free)
    below = lambda names: any(f"{path}.".startswith(f"{name}.") for name in names)
    return below(free) and not below(extra["but"])


def may_change_partly(info: Any) -> bool:
    """Whether a key's value is a dict of which some keys may change, and others may not."""
    return isinstance(info.json_schema_extra, dict) and "but" in info.json_schema_extra
