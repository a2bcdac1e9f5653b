"""The spec of an experiment: a YAML file that says what is compared, on which data, over which seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from feddra_ds.common.errors import ConfigError
from feddra_ds.common.parse import parse_yaml
from feddra_ds.common.section import Section
from feddra_ds.common.text import shown
from feddra_ds.data.synthetic.hospitals import SynthOptions
from feddra_ds.data.synthetic.sites import Heterogeneity
from feddra_ds.experiments.shipped import find, names

Kind = Literal["dev", "test"]


class SynthData(Section):
    """`feddra-ds data synth` with the run's seed; the names are its options'."""

    num_pairs: int = 2000
    image_size: int = 32
    val_fraction: float = 0.2
    test_pairs: int | None = 200
    label_shift: float | Literal["none"] | None = None
    style_shift: bool = True
    scanner_shift: float = 1.0
    sizes: str | list[float] = "default"
    label_noise: dict[str, float] = Field({})
    hard_site: dict[str, float] = Field({})

    @field_validator("scanner_shift", mode="before")
    @classmethod
    def _on_off(cls, value: Any) -> Any:
        return float(value) if isinstance(value, bool) else value  # YAML reads on and off so

    def options(self, seed: int, num_workers: int | None = None) -> SynthOptions:
        """The options of the dataset of a seed."""
        heterogeneity = Heterogeneity(
            label_shift=math.inf if self.label_shift == "none" else self.label_shift,
            style_shift=self.style_shift,
            scanner_shift=self.scanner_shift,
            sizes=self.sizes if isinstance(self.sizes, str) else tuple(self.sizes),
            label_noise=self.label_noise,
            hard_sites=self.hard_site,
        )
        return SynthOptions(
            num_pairs=self.num_pairs,
            image_size=self.image_size,
            val_fraction=self.val_fraction,
            test_pairs=self.test_pairs,
            heterogeneity=heterogeneity,
            seed=seed,
            num_workers=num_workers,
            overwrite=True,
        )


class ConvertData(Section):
    """`feddra-ds data convert` with the run's seed, so that each seed has another split; the names are its options'."""

    csv: str
    image_column: str
    text_column: str
    client_column: str | None = None
    group_column: str | None = None
    site_column: str | None = None
    label_columns: list[str] = Field([])
    val_fraction: float = 0.2
    test_fraction: float = 0.25
    image_size: int | None = None
    repeated_texts: bool = False


class DataSpec(Section):
    """Where the dataset of a seed comes from: one of the three. --data DIR on the command line replaces it."""

    synth: SynthData | None = None
    convert: ConvertData | None = None
    path: str | None = None
    """A dataset that is there; the seeds then differ in the run alone."""


class Seeds(Section):
    """dev seeds choose between arms; test seeds are run once, when nothing will be chosen any more."""

    dev: list[int] = Field([])
    test: list[int] = Field([])


class EvaluateSpec(Section):
    """How a trained model is measured; the held-out sites are measured too."""

    split: str = "test"
    max_pairs: int = Field(2048, ge=2)
    batch_size: int = Field(128, ge=1)


class Spec(Section):
    """A whole experiment."""

    name: str
    about: str = ""
    base: str
    """The config that all runs start from: a shipped one's name, or a path (relative to the spec's folder too)."""
    data: DataSpec
    common: dict[str, Any] = Field({})
    """Keys (`section.key: value`) that all runs have, on top of base."""
    arms: dict[str, dict[str, Any]] = Field({})
    """What is compared: a name and its keys. `{run:ARM}` in a value is the folder of that arm's run of the same seed."""
    grid: dict[str, list[Any]] = Field({})
    """Keys with several values: every combination, on top of every arm."""
    controls: bool = False
    """Every arm once more, on train texts dealt at random to the images of their client; an arm is compared to its own."""
    seeds: Seeds
    baseline: str | None = None
    """The arm that the others are compared to, seed by seed; with `controls` each has its own, and there is none."""
    metrics: list[str] = Field(["recall@5", "worst_recall@5", "held_out_recall@5"])
    """What the tables show (feddra_ds/experiments/measure.py says what there is)."""
    evaluate: EvaluateSpec = EvaluateSpec()
    limit_s: float = Field(3600.0, gt=0)
    """Longest time in seconds of a run, after which it is ended and counts as crashed."""

    @property
    def default_out(self) -> Path:
        """Where an experiment's files are when nobody says."""
        return Path("runs") / "experiments" / self.name


def load(path: str | Path) -> Spec:
    """Read a spec. Raises ConfigError: one line for each problem."""
    try:
        tree = parse_yaml(find(path).read_bytes())
    except OSError as error:
        shipped = f"the specs that come with feddra_ds are {', '.join(names())}"
        raise ConfigError([f"SPEC: cannot read {path}: {error.strerror}; {shipped}"]) from error
    except ValueError as error:
        raise ConfigError([f"SPEC: {path} is not YAML: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"SPEC: {path} must be keys and values, got {type(tree).__name__}"])
    try:
        spec = Spec.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_line(path, item) for item in error.errors()]) from error
    if problems := _contradictions(spec):
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return spec


def _line(path: str | Path, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path}: {key}: there is no such key"
    if item["type"] == "missing":
        return f"{path}: {key}: is missing"
    return f"{path}: {key}: {item['msg'].replace('Input should be', 'must be', 1)} (got {shown(item['input'])})"


def _contradictions(spec: Spec) -> list[str]:
    problems = []
    given = [kind for kind in ("synth", "convert", "path") if getattr(spec.data, kind) is not None]
    if len(given) != 1:
        problems.append(f"data: give one of synth, convert and path, got {', '.join(given) or 'none'}")
    if both := sorted(set(spec.seeds.dev) & set(spec.seeds.test)):
        problems.append(f"seeds: {', '.join(map(str, both))} are dev and test seeds; what chose cannot test")
    for kind in ("dev", "test"):
        listed = getattr(spec.seeds, kind)
        if len(set(listed)) < len(listed):
            problems.append(f"seeds.{kind}: a seed is named twice")
    if not spec.arms and not spec.grid:
        problems.append("arms: give arms, grid, or both; there is nothing to run")
    if spec.controls and spec.baseline is not None:
        problems.append("baseline: goes without controls, which each arm is compared to")
    if spec.data.synth is not None:
        problems += [f"data.synth: {line.lstrip('-')}" for line in spec.data.synth.options(0).problems()]
    return problems
