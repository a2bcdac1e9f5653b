"""Radiology reports in sections: which part of a report describes the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Only these end a section: structured reports have sub-headings such as LUNGS: inside their findings.
_NAMES = {
    "findings and impression": ("findings", "impression"),
    "findings/impression": ("findings", "impression"),
    "findings": ("findings",),
    "finding": ("findings",),
    "impression": ("impression",),
    "impressions": ("impression",),
    "conclusion": ("impression",),
    "conclusions": ("impression",),
    **{
        name: (name,)
        for name in (
            "indication", "indications", "history", "clinical history", "clinical information", "clinical indication",
            "reason for exam", "reason for examination", "comparison", "comparisons", "comparison exam", "technique",
            "procedure", "examination", "exam", "study", "type of exam", "recommendation", "recommendations",
            "recommendation(s)", "notification", "wet read", "addendum",
        )
    },
}  # fmt: skip
_ANY = "|".join(re.escape(name) for name in sorted(_NAMES, key=len, reverse=True))
# At the start of a line in any case, within a line only in capitals: "The impression: …" is prose.
_HEADING = re.compile(rf"^[ \t]*(?i:({_ANY}))[ \t]*:|(?<![\w])({_ANY.upper()})[ \t]*:", re.M)

SECTIONS = tuple(dict.fromkeys(name for names in _NAMES.values() for name in names))


def sections(report: str) -> dict[str, str]:
    """{section: text} in the report's order, white space folded; a section that comes twice is joined.

    Synonyms have one name (Conclusion is impression); what two sections share is under both. What comes before the first
    heading is left out.
    """
    marks = list(_HEADING.finditer(report))
    found: dict[str, str] = {}
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        text = " ".join(report[mark.end() : following.start() if following else None].split())
        if text:
            for name in _NAMES[(mark[1] or mark[2]).lower()]:
                found[name] = f"{found[name]} {text}" if name in found else text
    return found


def choose_sections(report: str, wanted: Sequence[str]) -> str:
    """The wanted sections of a report, in the order wanted, as one text; "" where it has none of them."""
    found = sections(report)
    return " ".join(dict.fromkeys(found[name] for name in wanted if name in found))
