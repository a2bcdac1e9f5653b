"""A comparison as SVG: a row an arm, a point a seed, the mean with its interval."""

from __future__ import annotations

import html

from feddra_ds.experiments.compare import Cell, Comparison, shown, unit
from feddra_ds.report.charts import ticks

_WIDTH, _ROW, _TOP, _BOTTOM, _RIGHT = 720, 30, 40, 34, 110
_STYLE = """
text{font:13px system-ui,sans-serif;fill:#333}.t{font-weight:600}.k{fill:#666;font-size:11px}
.g{stroke:#ddd}.b{stroke:#999;stroke-dasharray:3 3}.i{stroke:#1f5fa8;stroke-width:3}.m{fill:#1f5fa8}.s{fill:#1f5fa8;opacity:.35}
@media (prefers-color-scheme:dark){text{fill:#ddd}.k{fill:#999}.g{stroke:#444}.i{stroke:#7db3ec}.m,.s{fill:#7db3ec}}
"""


def draw(found: Comparison, metric: str) -> str:
    """The SVG of one metric. Raises ValueError where no arm has it."""
    arms = [arm for arm in found.arms if (arm, metric) in found.cells]
    if not arms:
        raise ValueError(f"metrics: no row has {metric}")
    cells = {arm: found.cells[arm, metric] for arm in arms}
    left = 20 + round(7.2 * max(map(len, arms)))
    height = _TOP + _ROW * len(arms) + _BOTTOM
    marks = ticks(min(_least(c) for c in cells.values()), max(_most(c) for c in cells.values()), 6)
    across = lambda v: left + (v - marks[0]) / (marks[-1] - marks[0]) * (_WIDTH - left - _RIGHT)
    title = f"{unit(metric)}, {max(c.mean.n for c in cells.values())} {found.kind} seeds"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}"><style>{_STYLE}</style>',
        f'<text class="t" x="20" y="22">{html.escape(title)}</text>',
    ]
    base = height - _BOTTOM
    for mark in marks:
        out.append(f'<path class="g" d="M{across(mark):.1f} {_TOP}V{base}"/>')
        out.append(
            f'<text class="k" x="{across(mark):.1f}" y="{base + 18}" text-anchor="middle">{shown(metric, mark)}</text>'
        )
    bases = set(found.baseline.values())
    if len(bases) == 1 and (one := bases.pop()) in cells:
        out.append(f'<path class="b" d="M{across(cells[one].mean.mean):.1f} {_TOP}V{base}"/>')
    for number, (arm, cell) in enumerate(cells.items()):
        y = _TOP + _ROW * (number + 0.5)
        out.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{html.escape(arm)}</text>')
        out += [
            f'<circle class="s" cx="{across(v):.1f}" cy="{y:.1f}" r="4"><title>seed {seed}: {shown(metric, v)}</title></circle>'
            for seed, v in cell.values.items()
        ]
        if cell.mean.low is not None and cell.mean.high is not None:
            out.append(f'<path class="i" d="M{across(cell.mean.low):.1f} {y:.1f}H{across(cell.mean.high):.1f}"/>')
        out.append(f'<circle class="m" cx="{across(cell.mean.mean):.1f}" cy="{y:.1f}" r="5"/>')
        half = "" if cell.mean.high is None else f" ± {shown(metric, cell.mean.high - cell.mean.mean)}"
        out.append(f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 4:.1f}">{shown(metric, cell.mean.mean)}{half}</text>')
    return "".join(out) + "</svg>\n"


def _least(cell: Cell) -> float:
    return min([*cell.values.values(), *([] if cell.mean.low is None else [cell.mean.low])])


def _most(cell: Cell) -> float:
    return max([*cell.values.values(), *([] if cell.mean.high is None else [cell.mean.high])])
