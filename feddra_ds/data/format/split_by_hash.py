"""`data.val_fraction`: which pairs are val, for ever the same, whatever else the data hold and however they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def group_hash(key: str, info: Mapping[str, Any]) -> str:
    """16 hex digits: of the patient that a pair's json names, else of the pair's key, as it is in its tar."""
    patient = info.get("patient")
    name = f"key {key}" if patient in (None, "") else f"patient {patient}"
    return hashlib.blake2b(f"val {name}".encode(), digest_size=8).hexdigest()


def is_val(groups: np.ndarray, fraction: float) -> np.ndarray:
    """(n,) bool: the pairs whose group, (n,) uint64, is among the lowest `fraction` of all that there can be."""
    return groups < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2049))
