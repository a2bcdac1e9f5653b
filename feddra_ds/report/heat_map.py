"""A table of shares as a picture of its own, an SVG: a row a client, a column a label, dark where the share is large."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

_CELL, _ROW, _TOP, _LETTER = 40, 26, 44, 6.6  # pixels
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600;font-size:13px}.c{text-anchor:middle;font-size:11px}.w{fill:#fff}
rect{fill:#1f5fa8;stroke:#ddd}
@media (prefers-color-scheme:dark){text{fill:#ddd}rect{fill:#7db3ec;stroke:#444}.w{fill:#111}}
"""


def heat_map(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    """The SVG. rows: by name, a share from 0 to 1 for each of the columns."""
    left = 20 + round(_LETTER * max(map(len, rows)))
    tallest = round(_LETTER * max(map(len, columns)) * 0.71) + 10  # names of columns lean by 45°
    top = _TOP + tallest
    width = left + _CELL * len(columns) + tallest + 20
    height = top + _ROW * len(rows) + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}"><style>{_STYLE}</style>',
        f'<text class="t" x="12" y="22">{html.escape(title)}</text>',
    ]
    for number, name in enumerate(columns):
        x = left + _CELL * (number + 0.5)
        out.append(f'<text transform="translate({x:.0f} {top - 6}) rotate(-45)">{html.escape(name)}</text>')
    for line, (name, shares) in enumerate(rows.items()):
        y = top + _ROW * line
        out.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{html.escape(name)}</text>')
        for number, (column, share) in enumerate(zip(columns, shares, strict=True)):
            x = left + _CELL * number
            told = html.escape(f"{name}, {column}: {share:.1%}")
            out.append(
                f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_ROW}" fill-opacity="{share:.3f}"><title>{told}</title></rect>'
                f'<text class="c{" w" if share > 0.5 else ""}" x="{x + _CELL / 2:.0f}" y="{y + 17}">{share:.0%}</text>'
            )
    return "".join(out) + "</svg>\n"
