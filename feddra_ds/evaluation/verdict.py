"""How a result of `evaluate` is held against chance: its keys, its words and its rules.

Needs nothing but the result, so that what prints one starts fast.
"""

from __future__ import annotations

from typing import Any

POOLED = "pooled"
NUM_SHUFFLES = 20  # random orders of the control
ABOVE, BELOW, UNSURE = "above chance", "below chance", "not told apart from chance"
SURE = 4.0  # standard errors from chance at which a control has failed: it has many galleries and cut-offs


def judged(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The galleries of a result that are held against chance, by client or POOLED: the pooled one, else every client's,
    and those of the held-out clients."""
    if not result[POOLED]:
        return dict(result["clients"])
    return {POOLED: result[POOLED]} | {name: about for name, about in result["clients"].items() if about["held_out"]}


def joint_verdict(result: dict[str, Any]) -> str:
    """What the judged galleries say together: ABOVE where any of them is at any cut-off, else BELOW where any is."""
    told = {e["verdict"] for about in judged(result).values() for e in about["intervals"].values()}
    return next((word for word in (ABOVE, BELOW) if word in told), UNSURE)
