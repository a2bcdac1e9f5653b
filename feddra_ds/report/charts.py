"""Small charts as inline SVG: colours and fonts come from the page's CSS, so that they follow light and dark mode.

A chart is drawn twice, for wide and for narrow pages; the page shows the one that fits, with its text unscaled.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

NUM_COLOURS = 7  # colours of the page for clients, --c0 … --c6
NUM_SHADES = 5  # shades of one colour for parts and cut-offs, --t0 … --t4
_MAX_POINTS = 160
_MAX_TIPS = 700
_WIDE, _NARROW = 540, 340
_NAMES, _MAX_NAME = 168, 23  # pixels right of the lines for their names, and letters that fit there
_ROUND = '<text class="tick" x="0" y="{y}">round</text>'

Number = float | None


@dataclass(frozen=True)
class Series:
    """A line: one value per x, None where there is none. style: c0 … c6, t0 … t4, ink, muted; dash: drawn dashed."""

    name: str
    values: Sequence[Number]
    style: str
    dash: bool = False
    labelled: bool = True


def line_chart(
    series: Sequence[Series],
    x: Sequence[int],
    *,
    title: str,
    show: Callable[[float], str],
    from_zero: bool = False,
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """Lines over rounds. show: a value as text; references: (name, value) drawn as dotted horizontals.

    Returns both sizes and the legend of the narrow one.
    """
    keep = _thinned(len(x))
    x = [x[i] for i in keep]
    series = [Series(s.name, [s.values[i] for i in keep], s.style, s.dash, s.labelled) for s in series]
    drawn = [_lines(series, x, title, show, from_zero, references, wide) for wide in (True, False)]
    entries = [(s.name, s.style, s.dash) for s in series if s.labelled] + [
        (name, "muted", True) for name, _ in references
    ]
    return Markup(f'<div class="wide">{drawn[0]}</div><div class="narrow">{drawn[1]}{legend(entries)}</div>')


def stacked_bars(columns: Sequence[tuple[str, Sequence[float]]], x: Sequence[int], *, title: str, unit: str) -> Markup:
    """A bar per round, its parts stacked: columns of (name, a value per round)."""
    groups = _grouped(len(x), 40)
    labels = [f"{x[g[0]]}" if len(g) == 1 else f"{x[g[0]]}–{x[g[-1]]}" for g in groups]
    parts = [(name, [sum(values[i] for i in g) / len(g) for g in groups]) for name, values in columns]
    drawn = [_stack(parts, labels, title, unit, wide) for wide in (True, False)]
    entries = [(name, f"t{i}", False) for i, (name, _) in enumerate(columns)]
    return Markup(f'<div class="wide">{drawn[0]}</div><div class="narrow">{drawn[1]}</div>{legend(entries, "bars")}')


def legend(entries: Sequence[tuple[str, str, bool]], kind: str = "lines") -> Markup:
    """A list of (name, style, dash) with their keys."""
    items = "".join(
        f'<li><span class="key {kind} {style}{" dash" if dash else ""}"></span>{html.escape(name)}</li>'
        for name, style, dash in entries
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers that cover [low, high], about `wanted` of them."""
    if not high > low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / max(1, wanted - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _lines(
    series: Sequence[Series],
    x: Sequence[int],
    title: str,
    show: Callable[[float], str],
    from_zero: bool,
    references: Sequence[tuple[str, float]],
    wide: bool,
) -> str:
    width, height = (_WIDE, 270) if wide else (_NARROW, 220)
    known = [v for s in series for v in s.values if v is not None] + [v for _, v in references]
    if not known:
        return '<p class="none">nothing was measured yet</p>'
    marks = ticks(0.0 if from_zero else min(known), max(known), 5)
    low, high = marks[0], marks[-1]
    left, right, top, bottom = 48, (_NAMES if wide else 10), 10, 30
    across = lambda r: left + (width - left - right) * (0.5 if len(x) == 1 else (r - x[0]) / (x[-1] - x[0]))
    up = lambda v: top + (height - top - bottom) * (1 - (v - low) / (high - low))
    out = [_open(width, height, title)]
    for mark in marks:
        out.append(f'<path class="grid" d="M{left} {up(mark):.1f}H{width - right}"/>')
        out.append(
            f'<text class="tick" x="{left - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{_short(show(mark))}</text>'
        )
    for r in _x_marks(x, 7 if wide else 5):
        out.append(f'<text class="tick" x="{across(r):.1f}" y="{height - 10}" text-anchor="middle">{r}</text>')
    out.append(_ROUND.format(y=height - 10))
    names: list[tuple[float, str, str]] = []
    for name, value in references:
        out.append(f'<path class="line muted dot" d="M{left} {up(value):.1f}H{width - right}"/>')
        names.append((up(value), name, "muted"))
    tips = wide and sum(len(s.values) for s in series) <= _MAX_TIPS
    for s in series:
        points = [(across(r), up(v), r, v) for r, v in zip(x, s.values, strict=True) if v is not None]
        if not points:
            continue
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, _, _ in points)
        kind = f"{s.style}{' dash' if s.dash else ''}{'' if s.labelled else ' thin'}"
        out.append(f'<path class="line {kind}" d="{path}"/>')
        if len(points) <= 12 and s.labelled:
            out += [f'<circle class="dot {s.style}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py, _, _ in points]
        if tips and s.labelled:
            out += [
                f'<circle class="tip" cx="{px:.1f}" cy="{py:.1f}" r="7"><title>{html.escape(s.name)}, round {r}: {show(v)}'
                "</title></circle>"
                for px, py, r, v in points
            ]
        if s.labelled:
            names.append((points[-1][1], f"{show(points[-1][3])} {s.name}", s.style))
    if wide:
        for y, name, style in _spread(names, top + 6, height - bottom + 4, 14):
            text = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 8]}…{name[-7:]}"
            out.append(f'<text class="name {style}" x="{width - right + 8}" y="{y + 4:.1f}">{html.escape(text)}</text>')
    return "".join(out) + "</svg>"


def _stack(
    parts: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], title: str, unit: str, wide: bool
) -> str:
    width, height = (_WIDE, 230) if wide else (_NARROW, 200)
    totals = [sum(values[i] for _, values in parts) for i in range(len(labels))]
    if not totals:
        return '<p class="none">nothing was measured yet</p>'
    marks = ticks(0.0, max(totals), 4)
    left, right, top, bottom = 48, 10, 10, 30
    scale = (height - top - bottom) / marks[-1]
    base, slot = height - bottom, (width - left - right) / len(labels)
    bar = min(48.0, slot * 0.8)
    out = [_open(width, height, title), _ROUND.format(y=height - 10)]
    for mark in marks:
        y = base - mark * scale
        out.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        out.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g} {unit}</text>')
    every = math.ceil(len(labels) / (10 if wide else 5))
    for i, label in enumerate(labels):
        x, y = left + slot * (i + 0.5) - bar / 2, float(base)
        for j, (name, values) in enumerate(parts):
            tall = values[i] * scale
            if tall > 0.05:
                y -= tall
                out.append(
                    f'<rect class="bar t{j}" x="{x:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{tall:.1f}">'
                    f"<title>round {label}, {html.escape(name)}: {values[i]:.3g} {unit}</title></rect>"
                )
        if i % every == 0:
            out.append(
                f'<text class="tick" x="{x + bar / 2:.1f}" y="{height - 10}" text-anchor="middle">{label}</text>'
            )
    return "".join(out) + "</svg>"


def _short(text: str) -> str:
    """A tick's text without zeros at the end: 7 for 7.000."""
    return re.sub(r"(\.\d*?)0+(?=\D|$)", r"\1", text).replace(". ", " ").removesuffix(".")


def _open(width: int, height: int, title: str) -> str:
    name = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">'


def _x_marks(x: Sequence[int], wanted: int) -> list[int]:
    step = max(1, math.ceil((x[-1] - x[0]) / max(1, wanted - 1)))
    nice = next(n for n in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 10**9) if n >= step)
    marks = [r for r in range(x[0], x[-1] + 1) if r % nice == 0]
    return marks or [x[0]]


def _spread(names: list[tuple[float, str, str]], top: float, bottom: float, gap: float) -> list[tuple[float, str, str]]:
    """Move labels apart so that none covers another: down first, then up from the bottom."""
    placed = sorted(names)
    y = [n[0] for n in placed]
    for i in range(1, len(y)):
        y[i] = max(y[i], y[i - 1] + gap)
    if y:
        y[-1] = min(y[-1], bottom)
    for i in reversed(range(len(y) - 1)):
        y[i] = min(y[i], y[i + 1] - gap)
    return [(max(top, new), name, style) for new, (_, name, style) in zip(y, placed, strict=True)]


def _thinned(n: int) -> list[int]:
    step = max(1, math.ceil(n / _MAX_POINTS))
    return sorted({*range(0, n, step), n - 1}) if n else []


def _grouped(n: int, most: int) -> list[range]:
    size = max(1, math.ceil(n / most))
    return [range(i, min(i + size, n)) for i in range(0, n, size)]
