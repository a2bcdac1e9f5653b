"""Charts of what `evaluate` measured: how each subgroup is served, and how far the probabilities can be believed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from feddra_ds.common.text import decimals, percent

MAX_DIAGRAMS = 6  # labels with a diagram: those of the most pairs
_SIDE, _LEFT, _TOP, _BOTTOM = 240, 40, 8, 36


def subgroup_bars(told: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """{fields: {field: rows}, worst: a sentence or None} of an evaluation's `subgroups`; None where there were none.

    A row has value, pairs, and e: recall, low, high and chance at 5, None where the gallery was too small.
    """
    if not told:
        return None
    fields = {
        field: [
            {"value": value, "pairs": about["pairs"], "e": about.get("recall@5")} for value, about in values.items()
        ]
        for field, values in told["fields"].items()
    }
    worst = told["worst"]
    sentence = worst and (
        f"Furthest down, against chance: {worst['field']} = {worst['value']}, recall@5 {percent(worst['recall'])} % "
        f"({percent(worst['low'])} to {percent(worst['high'])}), chance {percent(worst['chance'])} %."
    )
    return {"fields": fields, "worst": sentence}


def calibration_diagrams(zero_shot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{label, ece, diagram} of up to MAX_DIAGRAMS labels of an evaluation's `zero_shot`, in its order."""
    told = {label: about["pooled"].get("calibration") for label, about in zero_shot.items()}
    known = [label for label, calibration in told.items() if calibration and calibration["bins"]]
    chosen = sorted(known, key=lambda label: -zero_shot[label]["pooled"]["n"])[:MAX_DIAGRAMS]
    return [
        {"label": label, "ece": told[label]["ece"], "diagram": reliability_diagram(told[label]["bins"], label)}
        for label in known
        if label in chosen
    ]


def reliability_diagram(bins: Sequence[Mapping[str, float]], label: str) -> Markup:
    """How often the most probable class is right, by its probability; on the diagonal they agree. The dots' areas are the shares
    of the pairs. bins: confidence, accuracy and n of each."""
    across = lambda v: _LEFT + v * _SIDE
    up = lambda v: _TOP + (1 - v) * _SIDE
    width, height, total = _LEFT + _SIDE + 10, _TOP + _SIDE + _BOTTOM, sum(b["n"] for b in bins)
    name = html.escape(f"Reliability diagram of {label}", quote=True)
    out = [f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{name}">']
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(f'<path class="grid" d="M{_LEFT} {up(mark):.1f}H{_LEFT + _SIDE}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
        out.append(
            f'<text class="tick" x="{across(mark):.1f}" y="{up(0) + 15:.1f}" text-anchor="middle">{mark:g}</text>'
        )
    out.append(f'<path class="line muted dash" d="M{across(0)} {up(0)}L{across(1)} {up(1)}"/>')
    out.append(
        f'<text class="tick" x="{across(0.5)}" y="{height - 4}" text-anchor="middle">probability → share right ↑</text>'
    )
    places = [(across(b["confidence"]), up(b["accuracy"])) for b in bins]
    out.append('<path class="line c0" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + '"/>')
    for (x, y), b in zip(places, bins, strict=True):
        tip = f"{b['n']} pairs, said {decimals(b['confidence'], 2)}, right {decimals(b['accuracy'], 2)}"
        radius = 2.5 + 7 * (b["n"] / total) ** 0.5
        out.append(f'<circle class="dot c0" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{tip}</title></circle>')
    return Markup("".join(out) + "</svg>")
