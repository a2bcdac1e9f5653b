"""The fused loss of a client's batch, equations (1) to (3): tensors in, loss out. Usable alone; torch comes on demand."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feddra_ds.losses.fused import fused_dro_loss
    from feddra_ds.losses.reference import alignment_per_pair
    from feddra_ds.losses.types import DroLoss

__all__ = ["DroLoss", "alignment_per_pair", "fused_dro_loss"]
_HOMES = {"DroLoss": "types", "alignment_per_pair": "reference", "fused_dro_loss": "fused"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # asked once
    return value
