"""Draws a synthetic study as a radiograph-like picture.

Legend: S side in pixels. Fields are (S, S) float32 over x (to the right of the picture, which is the patient's left) and
y (down), both in [-1, 1]; brightness is 0 (black, air) to 1 (white, bone and metal). 300 mm span the picture's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from feddra_ds.data.synthetic.scene import Finding, Scanner, Study

Field = np.ndarray
_MM = 2 / 320  # one millimetre of the patient
_SIGN = {"right": -1.0, "left": 1.0}


@dataclass
class Anatomy:
    """One patient's proportions and the fields that findings are drawn into."""

    x: Field
    y: Field
    lungs: dict[str, Field]  # soft masks, 0 to 1
    outer: dict[str, Field]  # distance inwards from the chest wall
    top: float
    base: float
    width: float
    image: Field
    rng: np.random.Generator


def render(
    study: Study, scanner: Scanner, size: int, body: np.random.Generator, film: np.random.Generator
) -> np.ndarray:
    """(S, S) uint8. `body` draws the patient (the same for every film of a patient), `film` the exposure and noise."""
    # Findings draw from a generator of their own, so that the exposure does not depend on what is found.
    play = np.random.Generator(np.random.Philox(key=int(film.integers(2**62))))
    anatomy = _anatomy(study, size, body, film, play)
    for finding in study.findings:
        _FINDINGS[finding.kind](anatomy, finding)
    return _expose(anatomy.image, scanner, film)


def _soft(distance: Field, width: float) -> Field:
    """1 where distance is positive, 0 where negative, with a smooth step `width` wide."""
    return 1 / (1 + np.exp(np.clip(-distance / (width / 4), -30, 30)))


def _add(image: Field, light: Field) -> Field:
    """Denser tissue on top: adds up while dark and saturates towards white, as film does."""
    return image + light * np.clip(1.15 - image, 0, 1)


def _blob(x: Field, y: Field, cx: float, cy: float, rx: float, ry: float) -> Field:
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2


def _noise(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Smooth noise in [-1, 1] with about `cells` bumps a side."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells + 3, cells + 3)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _anatomy(
    study: Study, size: int, body: np.random.Generator, film: np.random.Generator, play: np.random.Generator
) -> Anatomy:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    tilt, dx, dy = film.normal(0, 0.02), film.normal(0, 0.03), film.normal(0, 0.03)
    zoom = body.uniform(0.94, 1.08)
    x, y = (x - dx + tilt * y) * zoom, (y - dy - tilt * x) * zoom

    width = body.uniform(0.68, 0.82) * (0.96 if study.sex == "F" else 1.0)
    top, base = body.uniform(-0.80, -0.70), body.uniform(0.46, 0.60)
    if study.view == "AP":
        base -= 0.06  # lying down, shallow breath
    side = np.abs(x)

    torso = _soft(width + 0.16 + 0.10 * np.clip(y, -0.5, 1) - side, 0.08) * _soft(
        y + 0.98 - 0.55 * np.clip(side - 0.25, 0, 1), 0.12
    )
    image = 0.50 * torso + 0.06 * _soft(0.22 - side, 0.25) * torso

    lungs, outer = {}, {}
    for name, sign in _SIGN.items():
        u = sign * x
        t = np.clip((y - top) / (base - top), 0.0, 1.3)
        wall = width * (0.38 + 0.62 * np.sqrt(np.clip(1 - (1 - np.clip(t / 0.75, 0, 1)) ** 2, 0, 1))) - 0.02
        inner = 0.10 + 0.07 * np.clip(t - 0.25, 0, 1) + (0.05 * np.clip(t - 0.5, 0, 1) if sign > 0 else 0)
        middle = (wall + 0.12) / 2
        dome = base + (0.05 if sign > 0 else -0.01) + 0.16 * ((u - middle) / 0.36) ** 2 - 0.04
        apex = top + 0.10 * ((u - 0.30) / 0.20) ** 2
        outer[name] = wall - u
        lungs[name] = _soft(wall - u, 0.05) * _soft(u - inner, 0.06) * _soft(dome - y, 0.05) * _soft(y - apex, 0.06)
    both = lungs["right"] + lungs["left"]
    image = image * (1 - both) + both * (0.17 + 0.04 * _noise(body, size, 5))

    below = _soft(y - base - 0.05, 0.15) * torso
    image += 0.12 * below * (1 - both)
    bx, by, depth = body.uniform(0.28, 0.45), base + body.uniform(0.16, 0.26), body.choice([0.0, 0.10, 0.18])
    image -= depth * _soft(1 - _blob(x, y, bx, by, 0.14, 0.075) + 0.5 * _noise(body, size, 6), 1.2)  # stomach bubble

    # Vessels fan out from each hilum and thin out on their way.
    vessels = np.zeros_like(x)
    for sign in _SIGN.values():
        hx, hy = sign * 0.17, top + 0.50 * (base - top)
        vessels += 0.17 * np.exp(-_blob(x, y, hx, hy, 0.08, 0.13)) * (1 + 0.5 * _noise(body, size, 14))
        for angle in (np.linspace(-1.3, 1.3, 9) + body.normal(0, 0.08, 9)).tolist():
            ux, uy = sign * math.cos(angle), math.sin(angle)
            along = np.maximum((x - hx) * ux + (y - hy) * uy, 0)
            across = (y - hy) * ux - (x - hx) * uy + body.normal(0, 0.10) * along * along
            near, far = (along / 0.1) ** 2, (along / 0.45) ** 2
            thick = 0.022 - 0.020 * np.minimum(along, 0.8)
            vessels += 0.10 * near / (1 + near) * np.exp(-((across / thick) ** 2) - far * far)
    image += vessels * both

    # Heart (mostly on the patient's left), aortic knob, upper mediastinum, windpipe, spine.
    half = study.heart_ratio * width
    cx, cy = 0.30 * half, base - 0.20
    heart = _soft(1 - _blob(x + 0.35 * (y - cy), y, cx, cy, half * 0.98, 0.30), 0.22)
    image = image * (1 - heart) + heart * np.maximum(image, 0.64)
    lungs = {name: mask * (1 - 0.75 * heart) for name, mask in lungs.items()}  # what lies behind it hardly shows
    hilum = _soft(0.135 + 0.02 * body.normal() - side - 0.08 * np.clip(y - top, 0, 1) * (side < 0), 0.06) * _soft(
        base + 0.05 - y, 0.1
    )
    knob = _soft(1 - _blob(x, y, 0.13, top + 0.34 * (base - top), 0.085, 0.085), 0.5)
    image = np.maximum(image, 0.60 * np.maximum(hilum, knob) * torso)
    image -= 0.13 * _soft(0.035 - np.abs(x + 0.01), 0.03) * _soft(top + 0.42 * (base - top) - y, 0.1)
    discs = 0.5 + 0.5 * np.cos((y - top) * 2 * np.pi / 0.155)
    image += 0.07 * _soft(0.085 - side, 0.05) * (0.45 + 0.55 * discs) * torso

    # Ribs: rear arcs slope down and out, front arcs down and in; clavicles; shoulder blades.
    ribs = np.zeros_like(x)
    spacing = (base - top) / 8.2
    curve = 0.55 * (side - 0.10) ** 2 - 0.12 * side
    for k in range(10):
        y0 = top + (k - 0.2) * spacing
        thick = 0.020 + 0.004 * np.sin(7 * side)
        offset = y - (y0 + curve * (0.5 + 0.09 * k))
        ribs += 0.10 * (np.exp(-(((offset - 0.020) / 0.009) ** 2)) + np.exp(-(((offset + 0.020) / 0.009) ** 2)))
        ribs += 0.06 * np.exp(-((offset / thick) ** 2))
        front = y - (y0 + 0.10 + 0.42 * (width - side))
        ribs += 0.045 * np.exp(-((front / 0.022) ** 2)) * _soft(side - 0.28, 0.1) * (k < 7)
    image += (
        ribs
        * _soft(width - side, 0.04)
        * _soft(side - 0.06, 0.05)
        * _soft(base + 0.12 - y, 0.15)
        * _soft(y - top, 0.08)
    )
    collar = y - (top + 0.10 - 0.16 * (side - 0.1) + 0.05 * np.sin(5 * side))
    image += 0.16 * np.exp(-((collar / 0.030) ** 2)) * _soft(side - 0.07, 0.04) * _soft(width + 0.05 - side, 0.05)
    image += 0.05 * _soft(1 - _blob(side + 0.2 * y, y, width - 0.08, -0.30, 0.10, 0.30), 0.5)
    if study.sex == "F":
        image += 0.055 * _soft(1 - _blob(side, y, 0.42, base - 0.12, 0.30, 0.26), 0.4) * torso
    image += 0.012 * _noise(body, size, 24) * torso
    return Anatomy(x, y, lungs, outer, top, base, width, image, play)


def _place(a: Anatomy, finding: Finding) -> tuple[float, float]:
    """Centre of a sided finding's zone, with some play."""
    fraction = {"upper": 0.24, "mid": 0.52, "lower": 0.80}[finding.zone]
    x = _SIGN[finding.side] * (
        a.width * {"upper": 0.48, "mid": 0.56, "lower": 0.66}[finding.zone] + a.rng.normal(0, 0.03)
    )
    return x, a.top + fraction * (a.base - a.top) + a.rng.normal(0, 0.03)


def _grade(finding: Finding, mild: float, moderate: float, severe: float) -> float:
    return {"mild": mild, "moderate": moderate, "severe": severe}[finding.severity]


def _consolidation(a: Anatomy, f: Finding) -> None:
    cx, cy = _place(a, f)
    radius = _grade(f, 0.14, 0.20, 0.27)
    ragged = 1 - _blob(a.x, a.y, cx, cy, radius, radius * 0.85) + 0.55 * _noise(a.rng, len(a.x), 9)
    cloud = _soft(ragged, 0.9) * a.lungs[f.side]
    a.image = _add(a.image, _grade(f, 0.34, 0.42, 0.50) * cloud * (1 - 0.25 * np.abs(_noise(a.rng, len(a.x), 16))))


def _nodule(a: Anatomy, f: Finding) -> None:
    assert f.size_mm is not None
    cx, cy = _place(a, f)
    radius = f.size_mm * _MM * 0.75  # drawn half as large again as life, to survive at 64 pixels
    a.image = _add(a.image, 0.54 * _soft(1 - np.sqrt(_blob(a.x, a.y, cx, cy, radius, radius)), 0.35) * a.lungs[f.side])


def _effusion(a: Anatomy, f: Finding) -> None:
    level = a.base - _grade(f, 0.08, 0.26, 0.48)
    meniscus = level + 0.22 * np.sqrt(np.clip(a.outer[f.side], 0, 1)) - 0.05
    # Down to where the belly begins, inside the ribs, with the bottom corner rounded off.
    corner = a.outer[f.side] - 0.5 * np.clip(a.y - a.base, 0, 1)
    fluid = _soft(a.y - meniscus, 0.06) * _soft(corner, 0.05) * _soft(_SIGN[f.side] * a.x - 0.10, 0.06)
    a.image += fluid * np.clip(0.62 - a.image, 0, 1)


def _pneumothorax(a: Anatomy, f: Finding) -> None:
    depth = _grade(f, 0.10, 0.18, 0.28)
    t = (a.y - a.top) / (a.base - a.top)
    gap = depth * np.clip(1.15 - 0.9 * t, 0.15, 1.2)
    apex = a.top + depth * 0.9
    edge = np.maximum(gap - a.outer[f.side], (apex - a.y) * 0.9)  # positive in the air outside the collapsed lung
    air = _soft(edge, 0.025) * a.lungs[f.side]
    a.image = a.image * (1 - 0.80 * air) + 0.02 * air
    a.image += 0.20 * np.exp(-((edge / 0.012) ** 2)) * a.lungs[f.side]
    a.image += 0.07 * _soft(-edge, 0.05) * a.lungs[f.side]  # the lung itself is denser


def _atelectasis(a: Anatomy, f: Finding) -> None:
    cx, cy = _place(a, f)
    slope = _SIGN[f.side] * a.rng.uniform(-0.35, -0.05)
    for k in range({"mild": 1, "moderate": 2, "severe": 3}[f.severity]):
        offset = a.y - (cy + 0.075 * k + slope * (a.x - cx))
        band = np.exp(-((offset / 0.022) ** 2)) * np.exp(-((((a.x - cx) / 0.22) ** 2) ** 2))
        a.image = _add(a.image, 0.50 * band * a.lungs[f.side])


def _cardiomegaly(a: Anatomy, f: Finding) -> None:
    """Nothing to add: the heart is drawn from the study's cardiothoracic ratio."""


def _edema(a: Anatomy, f: Finding) -> None:
    strength = _grade(f, 0.14, 0.22, 0.31)
    middle = a.top + 0.55 * (a.base - a.top)
    for side, sign in _SIGN.items():
        wings = np.exp(-_blob(a.x, a.y, sign * 0.28, middle, 0.26, 0.34))
        streaks = 0.5 + 0.5 * _noise(a.rng, len(a.x), 24)
        a.image = _add(a.image, strength * wings * (0.6 + 0.8 * streaks) * a.lungs[side])
        lines = np.exp(-((np.sin((a.y - middle) * 42) / 0.35) ** 2)) * _soft(0.14 - a.outer[side], 0.05)
        a.image = _add(a.image, 0.4 * strength * lines * _soft(a.y - middle, 0.1) * a.lungs[side])


def _fibrosis(a: Anatomy, f: Finding) -> None:
    strength = _grade(f, 0.16, 0.24, 0.32)
    for side in _SIGN if f.side == "both" else (f.side,):
        height = a.top + (0.26 if f.zone == "upper" else 0.82) * (a.base - a.top)
        where = np.exp(-(((a.y - height) / 0.22) ** 2)) * a.lungs[side]
        net = 1 - np.clip(np.abs(_noise(a.rng, len(a.x), 22)) * 4, 0, 1)
        a.image = _add(a.image, strength * where * (net + 0.15))


def _pacemaker(a: Anatomy, f: Finding) -> None:
    cx, cy = 0.56 * a.width, a.top + 0.20 * (a.base - a.top)
    box = np.maximum(np.abs(a.x - cx) / 0.085, np.abs(a.y - cy) / 0.065)
    a.image = np.maximum(a.image, 1.0 * _soft(1 - box, 0.2))
    near = np.full_like(a.x, 9.0)
    for t in np.linspace(0, 1, 48).tolist():
        lead_x = cx - 0.05 - (cx - 0.16) * math.sin(t * math.pi / 2)
        lead_y = cy - 0.05 - 0.10 * math.sin(t * math.pi) + (a.base - 0.20 - cy) * t * t
        near = np.minimum(near, (a.x - lead_x) ** 2 + (a.y - lead_y) ** 2)
    a.image = np.maximum(a.image, 0.95 * np.exp(-near / 0.013**2))


def _cavity(a: Anatomy, f: Finding) -> None:
    assert f.size_mm is not None
    cx, cy = _place(a, f)
    radius = np.sqrt(_blob(a.x, a.y, cx, cy, 1, 1)) * (1 + 0.12 * _noise(a.rng, len(a.x), 5))
    outer = 0.07 + f.size_mm * _MM * 0.25
    wall = np.exp(-(((radius - outer * 0.8) / (outer * 0.24)) ** 2))
    a.image = _add(a.image, 0.48 * wall * a.lungs[f.side])
    a.image -= 0.10 * _soft(outer * 0.6 - radius, 0.03) * a.lungs[f.side]


_FINDINGS = {
    "consolidation": _consolidation,
    "nodule": _nodule,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "atelectasis": _atelectasis,
    "cardiomegaly": _cardiomegaly,
    "edema": _edema,
    "fibrosis": _fibrosis,
    "pacemaker": _pacemaker,
    "cavity": _cavity,
}


def _expose(image: Field, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """The site's scanner: tone curve, vignette, blur, noise, side marker, border. (S, S) uint8."""
    size = len(image)
    image = (image - 0.42) * scanner.contrast * rng.uniform(0.95, 1.05) + 0.42 + rng.normal(0, 0.015)
    image = np.clip(image, 0, 1) ** scanner.gamma
    if scanner.vignette:
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        image = image * (1 - scanner.vignette * 0.5 * (axis[:, None] ** 2 + axis[None, :] ** 2))
    image = image + rng.normal(0, scanner.noise, image.shape)
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    if scanner.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scanner.blur * size))
    draw = ImageDraw.Draw(picture)
    if scanner.marker:
        where = {"top": (0.06, 0.04), "left": (0.02, 0.45), "corner": (0.88, 0.04), "bottom": (0.05, 0.88)}[
            scanner.marker
        ]
        letter = "L" if scanner.marker == "corner" else "R"
        draw.text((where[0] * size, where[1] * size), letter, fill=245, font_size=max(8, size * 0.09))
    if scanner.border:
        edge = round(scanner.border * size * rng.uniform(0.7, 1.3))
        draw.rectangle((0, 0, size - 1, size - 1), outline=0, width=max(1, edge))
    return np.asarray(picture)
