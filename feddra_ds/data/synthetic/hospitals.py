"""Radiograph-like pictures with reports from five different hospitals and a held-out sixth."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.sources.split import choose_validation, components
from feddra_ds.data.synthetic.image import render
from feddra_ds.data.synthetic.reports import say_nothing, write_report
from feddra_ds.data.synthetic.scene import HELD_OUT, KINDS, RARE_KIND, Site, Study, draw_study, generator
from feddra_ds.data.synthetic.sites import Heterogeneity, make_sites

_FOLLOW_UP = 0.2  # of the patients have a second film
_PARALLEL_FROM = 400


@dataclass(frozen=True)
class SynthOptions:
    """num_pairs: train and val over the five sites; the held-out site comes on top. image_size: side in pixels.
    val_fraction: share of each site's pairs for val. test_pairs: test pairs of each of the six sites, of patients of their
    own, on top of num_pairs; None: a test split of the held-out site alone. num_workers: processes that draw, None for one
    per core. The seed decides every byte."""

    num_pairs: int = 2000
    image_size: int = 128
    val_fraction: float = 0.2
    test_pairs: int | None = None
    heterogeneity: Heterogeneity = field(default_factory=Heterogeneity)
    seed: int = 0
    num_workers: int | None = None
    overwrite: bool = False

    def problems(self) -> list[str]:
        """What is wrong, a line for each option of `data synth`."""
        out = []
        if self.num_pairs < 20:
            out.append(f"--num-pairs: must be at least 20, got {self.num_pairs}")
        if not 16 <= self.image_size <= 2048:
            out.append(f"--image-size: must be from 16 to 2048, got {self.image_size}")
        if not 0 < self.val_fraction < 1:
            out.append(f"--val-fraction: must be above 0 and below 1, got {self.val_fraction}")
        if self.test_pairs is not None and self.test_pairs < 2:
            out.append(f"--test-pairs: must be at least 2, got {self.test_pairs}")
        return out + self.heterogeneity.problems()


@dataclass(frozen=True)
class _Job:
    """One study to draw: everything that the picture and the report depend on.

    told: the study and film that the report is of, where it is another one. vague: the report says nothing.
    """

    seed: int
    site: Site
    study: Study
    film: int
    size: int
    told: tuple[Study, int] | None = None
    vague: bool = False


def synthesize(out: Path, options: SynthOptions, track: Track = untracked) -> dict[str, Counter[str]]:
    """Make the dataset at `out`; returns for every site how many of its pairs are train, val and test, how many are
    `normal`, and how many show the rare kind. Raises DataError.
    """
    if problems := options.problems():
        raise DataError(problems)
    sites = (*make_sites(options.heterogeneity, options.seed), HELD_OUT)
    counts: dict[str, Counter[str]] = {site.name: Counter() for site in sites}
    with DatasetWriter(out, overwrite=options.overwrite) as writer:
        writer.held_out.append(HELD_OUT.name)
        writer.info |= {
            "source": f"synthetic, seed {options.seed}",
            "sites": {site.name: site.title for site in sites},
            "label_names": list(KINDS),
            "image_size": options.image_size,
        }
        if options.heterogeneity != Heterogeneity():
            writer.info["heterogeneity"] = options.heterogeneity.described()
        plan = [
            planned
            for site, total in _sizes(sites, options)
            for planned in (*_plan(site, total, options), *_plan_test(site, options))
        ]
        workers = (os.cpu_count() or 1) if options.num_workers is None else options.num_workers
        drawn = zip(plan, _draw_all([job for job, _ in plan], workers), strict=True)
        for number, ((job, split), (image, text)) in enumerate(track(drawn, len(plan), "drawing")):
            site, info = job.site.name, job.study.info()
            if job.told is not None or job.vague:
                info["report"] = "vague" if job.vague else "of another study"
            writer.add(site, split, f"{site}-{number:06d}", image=image, suffix="png", text=text, info=info)
            counts[site] += Counter({split: 1, "normal": not job.study.findings, RARE_KIND: info["labels"][RARE_KIND]})
    return counts


def _sizes(sites: Sequence[Site], options: SynthOptions) -> list[tuple[Site, int]]:
    """Pairs of each site: `num_pairs` over the five by their shares, rounded so that the sum holds; the held-out on top."""
    *inside, held_out = sites
    exact = [site.share * options.num_pairs for site in inside]
    sizes = [int(size) for size in exact]
    for i in sorted(range(len(inside)), key=lambda i: sizes[i] - exact[i])[: options.num_pairs - sum(sizes)]:
        sizes[i] += 1
    outside = max(2, round(held_out.share * options.num_pairs)) if options.test_pairs is None else 0
    return [*zip(inside, sizes, strict=True), (held_out, outside)]


def _plan(site: Site, total: int, options: SynthOptions) -> Iterator[tuple[_Job, str]]:
    """The site's studies in the order of its shards, each with its split: test throughout for the held-out site."""
    studies = _studies(site, total, "p", generator("site", options.seed, site.name))
    groups = components([[study.patient] for study in studies])
    validation = choose_validation([site.name] * total, groups, options.val_fraction, options.seed)
    told = _mixed_up(site, studies, options)
    for i in permutation(total, "synth", options.seed, site.name).tolist():
        split = "test" if site.name == HELD_OUT.name else "val" if validation[i] else "train"
        yield _vague(_Job(options.seed, site, studies[i], i, options.image_size, told.get(i)), options), split


def _plan_test(site: Site, options: SynthOptions) -> Iterator[tuple[_Job, str]]:
    """The pairs of options.test_pairs; their reports are never mixed up, as a test is there to see what was learnt."""
    rng = generator("test", options.seed, site.name)
    for i, study in enumerate(_studies(site, options.test_pairs or 0, "t", rng)):
        yield _vague(_Job(options.seed, site, study, i, options.image_size), options), "test"


def _studies(site: Site, total: int, prefix: str, rng: np.random.Generator) -> list[Study]:
    """So many studies; some patients have two. prefix: of the patients' numbers."""
    studies: list[Study] = []
    patients = 0
    while len(studies) < total:
        first = draw_study(site, f"{site.name}-{prefix}{patients:05d}", rng)
        studies += [first] if rng.random() >= _FOLLOW_UP else [first, _follow_up(site, first, rng)]
        patients += 1
    return studies[:total]


def _mixed_up(site: Site, studies: Sequence[Study], options: SynthOptions) -> dict[int, tuple[Study, int]]:
    """Which of the site's reports are of another study: number → that study and its number."""
    share = options.heterogeneity.label_noise.get(site.name, 0.0)
    chosen = permutation(len(studies), "label noise", options.seed, site.name).tolist()[: round(share * len(studies))]
    others = chosen[1:] + chosen[:1] if len(chosen) > 1 else []  # one cycle, so that none keeps its own
    return {i: (studies[other], other) for i, other in zip(chosen, others, strict=len(chosen) > 1)}


def _vague(job: _Job, options: SynthOptions) -> _Job:
    """The job, its report a vague one where the site is a hard one and the dice say so."""
    share = options.heterogeneity.hard_sites.get(job.site.name, 0.0)
    dice = generator("vague", job.seed, job.study.patient, job.film) if share else None
    return replace(job, vague=True) if dice is not None and dice.random() < share else job


def _follow_up(site: Site, first: Study, rng: np.random.Generator) -> Study:
    """The same person on another day."""
    again = draw_study(site, first.patient, rng)
    return replace(again, age=first.age, sex=first.sex)


def _draw(job: _Job) -> tuple[bytes, str]:
    """(PNG bytes, report) of a job; a function of the job alone."""
    study = job.study
    body = generator("body", job.seed, study.patient)
    film = generator("film", job.seed, study.patient, job.film)
    pixels = render(study, job.site.scanner, job.size, body, film)
    told, number = job.told or (study, job.film)
    words = generator("report", job.seed, told.patient, number)
    text = say_nothing(words) if job.vague else write_report(told, job.site.style, words)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)
    return out.getvalue(), text


def _draw_all(jobs: list[_Job], workers: int) -> Iterator[tuple[bytes, str]]:
    """The jobs' results in order; from fresh interpreters where there is enough to do.

    Not a multiprocessing pool: its children import the caller's main module, and one that fails
    to start is started again without end.
    """
    if workers <= 1 or len(jobs) < _PARALLEL_FROM:
        yield from map(_draw, jobs)
        return
    code = f"from {__name__} import draw_part; draw_part()"
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    parts = []
    try:
        for part in range(workers):
            child = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
            )
            parts.append(child)
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died; reported below, where its result is missing
                pickle.dump(jobs[part::workers], child.stdin)
                child.stdin.close()
        for number in range(len(jobs)):
            pipe = parts[number % workers].stdout
            assert pipe is not None
            try:
                yield pickle.load(pipe)
            except EOFError:
                status = parts[number % workers].wait(10)
                raise DataError(
                    f"--num-workers: a drawing process ended with status {status}; try --num-workers 1"
                ) from None
    finally:
        for child in parts:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def draw_part() -> None:
    """A drawing process: a list of jobs on stdin, their results in order on stdout."""
    jobs = pickle.load(sys.stdin.buffer)
    for job in jobs:
        pickle.dump(_draw(job), sys.stdout.buffer)
        sys.stdout.buffer.flush()
