"""Writes the report of a synthetic study in the style of its site: findings, negations, measurements, impression."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from feddra_ds.data.synth_scene import Finding, Study

# Phrases of each kind. {sev}: severity or size word, {side}, {zone}, {mm}: millimetres.
_PHRASES: dict[str, tuple[str, ...]] = {
    "consolidation": (
        "{sev} consolidation in the {side} {zone} zone",
        "{sev} airspace opacity in the {side} {zone} lung",
        "{sev} patchy infiltrate of the {side} {zone} zone",
        "{side} {zone} zone pneumonia, {sev}",
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
        "the heart is enlarged, {sev}",
    ),
    "edema": (
        "{sev} pulmonary edema",
        "{sev} perihilar haziness with septal lines, consistent with edema",
        "{sev} vascular congestion and interstitial edema",
    ),
    "fibrosis": (
        "{sev} reticular fibrosis in {side} {zone} zones",
        "{sev} fibrotic scarring of {side} {zone} zones",
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


def write_report(study: Study, style: str, rng: np.random.Generator) -> str:
    """The report's text. style: structured, terse, narrative, measured, classic, or mixed (one of those at random).

    Every finding is told with its place and severity; absent kinds are negated now and then; nothing is invented.
    """
    if style == "mixed":
        style = str(rng.choice(list(_STYLES)))
    choose: Choose = lambda options: options[int(rng.integers(len(options)))]
    findings = [_phrase(finding, choose) for finding in study.findings]
    return _STYLES[style](study, findings, _negations(study, rng), choose)


def _phrase(finding: Finding, choose: Choose) -> str:
    fluid = finding.kind in ("effusion", "pneumothorax")
    severity = _SIZES[finding.severity] if fluid else choose(_WORDS[finding.severity])
    side = finding.side
    if finding.kind == "fibrosis":
        side = {"both": "both", "right": "the right", "left": "the left"}[side]
    phrase = choose(_PHRASES[finding.kind])
    text = phrase.format(sev=severity, side=side, zone=finding.zone, mm=finding.size_mm)
    return text.replace("the right upper zones", "the right upper zone").replace(
        "the left upper zones", "the left upper zone"
    )


def _negations(study: Study, rng: np.random.Generator) -> list[str]:
    present = {finding.kind for finding in study.findings}
    absent = [name for kind, name in _NAMES.items() if kind not in present and kind != "cavity"]
    return [str(name) for name in rng.choice(absent, size=min(len(absent), 2), replace=False)]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _ratio(study: Study) -> str:
    return f"{study.heart_ratio:.2f}"


def _structured(study: Study, findings: list[str], absent: list[str], choose: Choose) -> str:
    body = [_sentence(f) for f in findings] or [_sentence(choose(_CLEAR))]
    body.append(_sentence("no " + " or ".join(absent)))
    closing = " ".join(_sentence(f"{n}. {f}") for n, f in enumerate(findings, 1)) if len(findings) > 1 else ""
    impression = closing or _sentence(findings[0] if findings else choose(_NORMAL))
    return f"FINDINGS: {' '.join(body)} IMPRESSION: {impression}"


def _terse(study: Study, findings: list[str], absent: list[str], choose: Choose) -> str:
    view = "Portable AP chest." if study.view == "AP" else "PA chest."
    told = "; ".join(findings) if findings else choose(("nothing acute", "clear", "no acute findings"))
    return f"{view} {_sentence(told)} {choose((f'No {absent[0]}.', ''))}".strip()


def _narrative(study: Study, findings: list[str], absent: list[str], choose: Choose) -> str:
    who = f"{study.age}-year-old {'woman' if study.sex == 'F' else 'man'} with {choose(_HISTORIES)}."
    told = (
        f"The film shows {' and '.join(findings)}." if findings else f"{_sentence(choose(_CLEAR))} Normal heart size."
    )
    closing = choose(("Clinical correlation is recommended.", ""))
    return f"{who} {told} There is no {absent[0]} and no {absent[1]}. {closing}".strip()


def _measured(study: Study, findings: list[str], absent: list[str], choose: Choose) -> str:
    size = choose((f"Cardiothoracic ratio {_ratio(study)}.", f"CT ratio of {_ratio(study)}."))
    told = " ".join(_sentence(f) for f in findings) or _sentence(choose(_CLEAR))
    return f"{size} {told} No {absent[0]}. Conclusion: {_sentence(findings[0] if findings else choose(_NORMAL))}"


def _classic(study: Study, findings: list[str], absent: list[str], choose: Choose) -> str:
    told = ", ".join(findings) if findings else choose(_CLEAR)
    return f"{choose(('Chest film:', 'Thorax PA:', 'Radiogram:'))} {told}, {absent[0]} absent, heart {_heart(study)}."


def _heart(study: Study) -> str:
    return "of normal size" if study.heart_ratio < 0.5 else "enlarged"


_STYLES: dict[str, Callable[[Study, list[str], list[str], Choose], str]] = {
    "structured": _structured,
    "terse": _terse,
    "narrative": _narrative,
    "measured": _measured,
    "classic": _classic,
}
