"""Writes the report of a synthetic study in the style of its site: findings, negations, measurements, impression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feddra_ds.data.synthetic.scene import Finding, Study

# Phrases of each kind. {sev}, {adv}: severity or size; {side}, {zone}, {zones}: the place; {mm}: millimetres.
_PHRASES: dict[str, tuple[str, ...]] = {
    "consolidation": (
        "{sev} consolidation in the {side} {zone} zone",
        "{sev} airspace opacity in the {side} {zone} lung",
        "{sev} patchy infiltrate of the {side} {zone} zone",
        "{sev} pneumonia of the {side} {zone} zone",
    ),
    "nodule": (
        "{mm} mm nodule in the {side} {zone} zone",
        "round {mm} mm opacity in the {side} {zone} lung",
        "solitary {side} {zone} zone nodule measuring {mm} mm",
    ),
    "effusion": (
        "{sev} {side} pleural effusion",
        "{sev} pleural fluid on the {side} with blunting of the costophrenic angle",
        "{side} sided effusion, {sev}",
    ),
    "pneumothorax": (
        "{sev} {side} pneumothorax",
        "{sev} apical pneumothorax on the {side} with visible pleural line",
        "{side} sided pneumothorax, {sev}",
    ),
    "atelectasis": (
        "{sev} linear atelectasis in the {side} {zone} zone",
        "{sev} band of atelectasis in the {side} {zone} lung",
        "{side} {zone} zone plate atelectasis, {sev}",
    ),
    "cardiomegaly": (
        "{sev} cardiomegaly",
        "{sev} enlargement of the cardiac silhouette",
        "the heart is {adv} enlarged",
    ),
    "edema": (
        "{sev} pulmonary edema",
        "{sev} perihilar haziness with septal lines, consistent with edema",
        "{sev} vascular congestion and interstitial edema",
    ),
    "fibrosis": (
        "{sev} reticular fibrosis in {zones}",
        "{sev} fibrotic scarring of {zones}",
    ),
    "pacemaker": (
        "left sided pacemaker with lead in the right ventricle",
        "pacemaker device over the left chest",
    ),
    "cavity": (
        "thick walled cavity of {mm} mm in the {side} {zone} zone",
        "cavitary lesion in the {side} {zone} lung, {mm} mm",
    ),
}
_SIZES = {"mild": "small", "moderate": "moderate", "severe": "large"}
_WORDS = {"mild": ("mild", "slight"), "moderate": ("moderate",), "severe": ("severe", "marked", "extensive")}
_NAMES = {
    "consolidation": "consolidation",
    "nodule": "nodule",
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "edema": "pulmonary edema",
    "cavity": "cavity",
    "cardiomegaly": "cardiomegaly",
}
_NORMAL = (
    "no acute cardiopulmonary abnormality",
    "normal chest radiograph",
    "lungs are clear",
    "no active disease in the chest",
)
_CLEAR = ("the lungs are clear", "no focal lung lesion", "clear lungs", "lung fields are unremarkable")
_VAGUE = (
    "Compared with the film of {when}: no change.",
    "Unchanged since {when}.",
    "Findings as described on {when}.",
    "See the report of {when}.",
)
_HISTORIES = (
    "cough",
    "fever and cough",
    "shortness of breath",
    "chest pain",
    "routine follow up",
    "before surgery",
    "weight loss",
)

Choose = Callable[[tuple[str, ...]], str]


@dataclass
class _Notes:
    """What a style writes from: the findings in words, the same in other words, two kinds that are absent."""

    study: Study
    findings: list[str]
    again: list[str]
    absent: list[str]
    choose: Choose


def write_report(study: Study, style: str, rng: np.random.Generator) -> str:
    """The report's text. style: structured, terse, narrative, measured, classic, or mixed (one of those at random).

    Every finding is told with its place and severity; absent kinds are negated now and then; nothing is invented.
    """
    if style == "mixed":
        style = str(rng.choice(list(_STYLES)))
    choose: Choose = lambda options: options[int(rng.integers(len(options)))]
    told, again = ([_phrase(finding, choose) for finding in study.findings] for _ in range(2))
    return _STYLES[style](_Notes(study, told, again, _negations(study, rng), choose))


def say_nothing(rng: np.random.Generator) -> str:
    """A report that no picture can be told by, and that hardly another pair has: its date is nowhere to be seen."""
    months = "January February March April May June July August September October November December".split()
    when = f"{rng.integers(1, 29)} {rng.choice(months)} {rng.integers(1990, 2024)}"
    return str(rng.choice(_VAGUE)).format(when=when)


def _phrase(finding: Finding, choose: Choose) -> str:
    fluid = finding.kind in ("effusion", "pneumothorax")
    return choose(_PHRASES[finding.kind]).format(
        sev=_SIZES[finding.severity] if fluid else choose(_WORDS[finding.severity]),
        adv={"mild": "mildly", "moderate": "moderately", "severe": "severely"}[finding.severity],
        side=finding.side,
        zone=finding.zone,
        zones=f"both {finding.zone} zones" if finding.side == "both" else f"the {finding.side} {finding.zone} zone",
        mm=finding.size_mm,
    )


def _negations(study: Study, rng: np.random.Generator) -> list[str]:
    present = {finding.kind for finding in study.findings}
    absent = [name for kind, name in _NAMES.items() if kind not in present and kind != "cavity"]
    return [str(name) for name in rng.choice(absent, size=min(len(absent), 2), replace=False)]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _structured(n: _Notes) -> str:
    body = [_sentence(f) for f in n.findings] or [_sentence(n.choose(_CLEAR))]
    body.append(_sentence("no " + " or ".join(n.absent)))
    impression = " ".join(f"{i}. {_sentence(f)}" for i, f in enumerate(n.again, 1)) or _sentence(n.choose(_NORMAL))
    return f"FINDINGS: {' '.join(body)} IMPRESSION: {impression}"


def _terse(n: _Notes) -> str:
    view = "Portable AP chest." if n.study.view == "AP" else "PA chest."
    told = "; ".join(n.findings) or n.choose(("nothing acute", "clear", "no acute findings"))
    return f"{view} {_sentence(told)} {n.choose((f'No {n.absent[0]}.', ''))}".strip()


def _narrative(n: _Notes) -> str:
    who = f"{n.study.age}-year-old {'woman' if n.study.sex == 'F' else 'man'} with {n.choose(_HISTORIES)}."
    told = (
        f"The film shows {' and '.join(n.findings)}."
        if n.findings
        else f"{_sentence(n.choose(_CLEAR))} Normal heart size."
    )
    closing = n.choose(("Clinical correlation is recommended.", ""))
    return f"{who} {told} There is no {n.absent[0]} and no {n.absent[1]}. {closing}".strip()


def _measured(n: _Notes) -> str:
    size = f"{n.choose(('Cardiothoracic ratio', 'CT ratio of'))} {n.study.heart_ratio:.2f}."
    told = " ".join(_sentence(f) for f in n.findings) or _sentence(n.choose(_CLEAR))
    return f"{size} {told} No {n.absent[0]}. Conclusion: {_sentence(n.again[0] if n.again else n.choose(_NORMAL))}"


def _classic(n: _Notes) -> str:
    told = ", ".join(n.findings) or n.choose(_CLEAR)
    heart = "of normal size" if n.study.heart_ratio < 0.5 else "enlarged"
    return f"{n.choose(('Chest film:', 'Thorax:', 'Radiogram:'))} {told}, {n.absent[0]} absent, heart {heart}."


_STYLES: dict[str, Callable[[_Notes], str]] = {
    "structured": _structured,
    "terse": _terse,
    "narrative": _narrative,
    "measured": _measured,
    "classic": _classic,
}
