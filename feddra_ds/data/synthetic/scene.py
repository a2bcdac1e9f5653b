"""What a synthetic study shows: findings composed of kind × side × zone × severity, and the sites that see them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from feddra_ds.data.loading.order import seeded

SIDES = ("right", "left")
ZONES = ("upper", "mid", "lower")
SEVERITIES = ("mild", "moderate", "severe")

# Kind → the places it takes: (sides, zones). Bilateral kinds have one side, "both"; kinds without a zone have ("",).
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "consolidation": (SIDES, ZONES),
    "nodule": (SIDES, ZONES),
    "effusion": (SIDES, ("lower",)),
    "pneumothorax": (SIDES, ("upper",)),
    "atelectasis": (SIDES, ("mid", "lower")),
    "cardiomegaly": (("both",), ("",)),
    "edema": (("both",), ("",)),
    "fibrosis": (("both", *SIDES), ("upper", "lower")),
    "pacemaker": (("left",), ("upper",)),
    "cavity": (SIDES, ("upper",)),
}
RARE_KIND = "cavity"


@dataclass(frozen=True)
class Finding:
    """One finding. size_mm is the diameter where the kind is measured (nodule, cavity), else None."""

    kind: str
    side: str
    zone: str
    severity: str
    size_mm: int | None = None


@dataclass(frozen=True)
class Study:
    """One radiograph of a patient. heart_ratio is the cardiothoracic ratio that is drawn and may be reported."""

    site: str
    patient: str
    age: int
    sex: str
    view: str
    heart_ratio: float
    findings: tuple[Finding, ...]

    def info(self) -> dict[str, Any]:
        """The sample's json member: every kind as a 0/1 label, the findings in full, the patient."""
        present = {finding.kind for finding in self.findings}
        return {
            "labels": {kind: int(kind in present) for kind in KINDS},
            "site": self.site,
            "patient": self.patient,
            "findings": [asdict(finding) for finding in self.findings],
            "age": self.age,
            "sex": self.sex,
            "view": self.view,
            "heart_ratio": self.heart_ratio,
        }


@dataclass(frozen=True)
class Scanner:
    """How a site's pictures look. contrast, gamma: of the tone curve; noise: its standard deviation in grey levels 0..1;
    blur: in parts of the image's side; border: black frame, same unit; marker: where the side letter stands."""

    contrast: float = 1.0
    gamma: float = 1.0
    noise: float = 0.01
    blur: float = 0.0
    border: float = 0.0
    vignette: float = 0.0
    marker: str = ""


@dataclass(frozen=True)
class Site:
    """One hospital: its share of the pairs, what it sees, its scanner, its report style and its share of AP films."""

    name: str
    title: str
    share: float
    normal: float
    mix: dict[str, float]
    scanner: Scanner
    style: str
    portable: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


SITES = (
    Site("university_hospital", "a university hospital that sees everything", 0.30, 0.20,
         {"consolidation": 3, "nodule": 3, "effusion": 3, "pneumothorax": 2, "atelectasis": 2, "cardiomegaly": 2, "edema": 2,
          "fibrosis": 2, "pacemaker": 1},
         Scanner(contrast=1.05, noise=0.008, marker="top"), "structured"),
    Site("emergency_department", "an emergency department with portable machines", 0.26, 0.15,
         {"consolidation": 6, "effusion": 4, "pneumothorax": 4, "atelectasis": 2, "edema": 2, "nodule": 0.5},
         Scanner(contrast=0.78, gamma=0.85, noise=0.035, blur=0.004, marker="left"), "terse", portable=0.9),
    Site("community_clinic", "a community clinic, where most are well", 0.20, 0.40,
         {"consolidation": 3, "cardiomegaly": 3, "nodule": 2, "atelectasis": 1, "fibrosis": 1, "pacemaker": 1},
         Scanner(contrast=0.9, gamma=1.15, noise=0.015, vignette=0.25), "narrative"),
    Site("heart_centre", "a heart centre", 0.16, 0.10,
         {"cardiomegaly": 6, "edema": 5, "effusion": 4, "pacemaker": 4, "atelectasis": 1},
         Scanner(contrast=1.25, gamma=0.95, noise=0.01, marker="corner"), "measured", portable=0.3),
    Site("lung_sanatorium", "a small lung sanatorium, the only one that sees cavities", 0.08, 0.10,
         {"cavity": 4, "nodule": 4, "fibrosis": 4, "consolidation": 2, "effusion": 1},
         Scanner(contrast=1.1, gamma=1.3, noise=0.02, blur=0.006, border=0.05, vignette=0.3), "classic"),
)  # fmt: skip
HELD_OUT = Site(
    "island_hospital", "a hospital that nobody trained on", 0.15, 0.20,
    {"consolidation": 3, "nodule": 3, "effusion": 3, "pneumothorax": 2, "atelectasis": 2, "cardiomegaly": 3, "edema": 2,
     "fibrosis": 2, "pacemaker": 2, "cavity": 1},
    Scanner(contrast=0.95, gamma=0.8, noise=0.025, blur=0.003, border=0.03, marker="bottom"), "mixed", portable=0.4,
)  # fmt: skip


def generator(*parts: object) -> np.random.Generator:
    """A random generator that is a function of the parts."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(seeded("synth", *parts)[:16], dtype=np.uint64)))


def draw_study(site: Site, patient: str, rng: np.random.Generator) -> Study:
    """A study with the site's mix of findings: none with probability `site.normal`, else one to three kinds."""
    age = int(np.clip(rng.normal(58, 17), 18, 95))
    sex = str(rng.choice(["F", "M"]))
    view = "AP" if rng.random() < site.portable else "PA"
    findings: list[Finding] = []
    if rng.random() >= site.normal:
        kinds, weights = list(site.mix), np.array(list(site.mix.values()), dtype=float)
        number = min(len(kinds), int(rng.choice([1, 2, 3], p=[0.55, 0.33, 0.12])))
        for kind in rng.choice(kinds, size=number, replace=False, p=weights / weights.sum()):
            findings.append(_draw_finding(str(kind), rng))
    heart = {f.severity for f in findings if f.kind == "cardiomegaly"}
    ratio = {"mild": 0.55, "moderate": 0.61, "severe": 0.68}[heart.pop()] if heart else rng.uniform(0.42, 0.48)
    return Study(
        site.name, patient, age, sex, view, round(float(ratio + rng.uniform(-0.015, 0.015)), 2), tuple(findings)
    )


def _draw_finding(kind: str, rng: np.random.Generator) -> Finding:
    sides, zones = KINDS[kind]
    side, zone = str(rng.choice(sides)), str(rng.choice(zones))
    severity = str(rng.choice(SEVERITIES, p=[0.3, 0.4, 0.3]))
    size = None
    if kind in ("nodule", "cavity"):
        low, high = {"mild": (8, 13), "moderate": (14, 21), "severe": (22, 30)}[severity]
        size = int(rng.integers(low, high + 1)) * (2 if kind == "cavity" else 1)
    return Finding(kind, side, zone, "moderate" if kind == "pacemaker" else severity, size)
