"""The sites of a synthetic dataset, with their heterogeneity as it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from feddra_ds.data.synthetic.scene import HELD_OUT, SITES, Scanner, Site, generator

_TINY = 1e-9  # findings rarer than this are not seen at all; the draw without repetition needs weights above 0


@dataclass(frozen=True)
class Heterogeneity:
    """How the sites differ. The defaults are the shipped five, which differ in everything.

    label_shift: Dirichlet α of each site's mix of findings around the held-out site's, which sees all kinds; inf: that
    very mix everywhere; None: the shipped mixes. style_shift: each site its own style of report, else all write as the
    held-out one does. scanner_shift: 0 (all have the held-out site's scanner) to 1 (each its own). sizes: `default`,
    `even`, or the sites' shares in their order. label_noise: site → share of its train and val pairs whose report is
    another study's. hard_sites: site → share of its pairs, of every split, whose report says nothing of the picture.
    """

    label_shift: float | None = None
    style_shift: bool = True
    scanner_shift: float = 1.0
    sizes: str | tuple[float, ...] = "default"
    label_noise: Mapping[str, float] = field(default_factory=dict)
    hard_sites: Mapping[str, float] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """The values for dataset.json, which has no infinity."""
        return asdict(self) | ({"label_shift": "none"} if self.label_shift == math.inf else {})

    def problems(self) -> list[str]:
        """What is wrong, a line for each option of `data synth`."""
        out = []
        if self.label_shift is not None and not self.label_shift > 0:
            out.append(f"--label-shift: must be above 0, or none for one mix at all sites, got {self.label_shift}")
        if not 0 <= self.scanner_shift <= 1:
            out.append(f"--scanner-shift: must be on, off, or a strength from 0 to 1, got {self.scanner_shift}")
        if isinstance(self.sizes, str):
            if self.sizes not in ("default", "even"):
                out.append(f"--sizes: must be default, even, or {len(SITES)} shares, got {self.sizes}")
        elif len(self.sizes) != len(SITES) or not all(0 < share < math.inf for share in self.sizes):
            out.append(f"--sizes: must be {len(SITES)} shares above 0, got {', '.join(map(str, self.sizes))}")
        names = [site.name for site in SITES]
        for option, shares in (("--label-noise", self.label_noise), ("--hard-site", self.hard_sites)):
            for name, share in shares.items():
                if name not in names:
                    out.append(f"{option}: there is no site {name}; there are: {', '.join(names)}")
                if not 0 <= share <= 1:
                    out.append(f"{option}: the share of {name} must be from 0 to 1, got {share}")
        return out


def make_sites(wanted: Heterogeneity, seed: int) -> tuple[Site, ...]:
    """The five sites as `wanted` says; equal to SITES for the defaults."""
    return tuple(_site(site, share, wanted, seed) for site, share in zip(SITES, _shares(wanted), strict=True))


def _shares(wanted: Heterogeneity) -> list[float]:
    if isinstance(wanted.sizes, str):
        return [1 / len(SITES)] * len(SITES) if wanted.sizes == "even" else [site.share for site in SITES]
    return [share / sum(wanted.sizes) for share in wanted.sizes]


def _site(site: Site, share: float, wanted: Heterogeneity, seed: int) -> Site:
    changes: dict[str, object] = {"share": share}
    if wanted.label_shift is not None:
        changes |= {"mix": _mix(site.name, wanted.label_shift, seed), "normal": HELD_OUT.normal}
    if not wanted.style_shift:
        changes["style"] = HELD_OUT.style
    if wanted.scanner_shift < 1:
        between = lambda own, common: common + wanted.scanner_shift * (own - common)
        changes["scanner"] = _scanner(site.scanner, wanted.scanner_shift)
        changes["portable"] = between(site.portable, HELD_OUT.portable)
    return replace(site, **changes)  # type: ignore[arg-type]


def _mix(name: str, alpha: float, seed: int) -> dict[str, float]:
    """A Dirichlet draw of mean HELD_OUT.mix; with an even mean α would be each kind's parameter."""
    total = sum(HELD_OUT.mix.values())
    common = {kind: weight / total for kind, weight in HELD_OUT.mix.items()}
    if math.isinf(alpha):
        return common
    rng = generator("mix", seed, name)
    drawn = rng.dirichlet([alpha * len(common) * share for share in common.values()])
    kept = {kind: float(share) for kind, share in zip(common, drawn, strict=True) if share > _TINY}
    return kept or common


def _scanner(own: Scanner, strength: float) -> Scanner:
    """Between the held-out site's scanner (0) and the site's own; a side marker cannot lie between and is the site's own
    for any strength above 0."""
    common = HELD_OUT.scanner
    values = {
        f.name: getattr(common, f.name) + strength * (getattr(own, f.name) - getattr(common, f.name))
        for f in fields(Scanner)
        if f.name != "marker"
    }
    return Scanner(**values, marker=own.marker if strength else common.marker)
