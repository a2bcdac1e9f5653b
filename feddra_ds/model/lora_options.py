"""The keys of `model.adapter`, apart from feddra_ds/model/lora.py: a wrong one is found before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from feddra_ds.common.section import Section

FactorName = Literal["a", "b"]


class LoraOptions(Section):
    """The keys of `model.adapter`."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    r: int = Field(8, ge=1)
    """Rank of the update of a layer."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """With aggregation=stack: the rank of a client by its id, where it is not r."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / r, that of clients of another rank too."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before A; above 0 a run depends on how its batches are cut."""
    target_modules: list[str] | None = None
    """Names of Linear layers of the encoders' blocks, by their last parts (query, q_proj, mlp.fc1); null: all of them."""
    aggregation: Literal["factors", "product", "freeze_a", "residual", "alternate", "stack"] = "factors"
    """How the server averages: see docs/adapters.md."""

    @property
    def largest_rank(self) -> int:
        """Of any client: the rank that every engine has."""
        return max([self.r, *(self.ranks or {}).values()])

    def lower_rank(self, client: str) -> int | None:
        """The rank of a client where it is below the largest, else None."""
        rank = (self.ranks or {}).get(client, self.r)
        return rank if rank < self.largest_rank else None

    @property
    def scale(self) -> float:
        """s: what a layer's B A is multiplied by, for every client."""
        return self.alpha / self.r

    @property
    def moves_frozen(self) -> bool:
        """Whether the server moves the frozen weights under the adapters, so that they are state of the run."""
        return self.aggregation in ("residual", "stack")


def parse(adapter: Mapping[str, Any] | None) -> LoraOptions | None:
    """The validated `model.adapter`, or None. Raises ValueError with one line per problem, each with its key."""
    if adapter is None:
        return None
    try:
        options = LoraOptions.model_validate(dict(adapter))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(["model.adapter", *map(str, item["loc"])])
            unknown = item["type"] == "extra_forbidden"
            known = ", ".join(LoraOptions.model_fields)
            lines.append(f"{key}: unknown key; there are {known}" if unknown else f"{key}: {item['msg']}")
        raise ValueError("\n".join(lines)) from error
    if options.ranks is not None and options.aggregation != "stack":
        raise ValueError(
            f"model.adapter.ranks: aggregation={options.aggregation} averages factors of one rank; use stack, or r for all"
        )
    return options
