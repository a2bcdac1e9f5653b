"""The base of every section of the config, and what a key can say of itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys with types, defaults and a docstring each; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


# For Field(json_schema_extra=MAY_CHANGE): a run may go on with another value, because it does not change the mathematics.
MAY_CHANGE: dict[str, Any] = {"may_change_on_resume": True}


def may_change(info: Any) -> bool:
    """Whether a key, given by its pydantic FieldInfo, may differ between a checkpoint and the run that goes on from it."""
    extra = info.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("may_change_on_resume"))
