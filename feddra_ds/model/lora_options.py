"""The keys of `model.adapter`, apart from feddra_ds/model/lora.py: a wrong one is found before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from feddra_ds.common.section import Section


class LoraOptions(Section):
    """The keys of `model.adapter`."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    r: int = Field(8, ge=1)
    """Rank of the update of a layer."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before A; above 0 a run depends on how its batches are cut."""
    target_modules: list[str] | None = None
    """Names of Linear layers of the encoders' blocks, by their last parts (query, q_proj, mlp.fc1); null: all of them."""
    aggregation: Literal["factors", "product", "freeze_a"] = "factors"
    """How the server averages: see feddra_ds/model/lora.py."""


def parse(adapter: Mapping[str, Any] | None) -> LoraOptions | None:
    """The validated `model.adapter`, or None. Raises ValueError with one line per problem, each with its key."""
    if adapter is None:
        return None
    try:
        return LoraOptions.model_validate(dict(adapter))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(["model.adapter", *map(str, item["loc"])])
            unknown = item["type"] == "extra_forbidden"
            known = ", ".join(LoraOptions.model_fields)
            lines.append(f"{key}: unknown key; there are {known}" if unknown else f"{key}: {item['msg']}")
        raise ValueError("\n".join(lines)) from error
