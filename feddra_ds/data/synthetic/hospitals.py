"""Radiograph-like pictures with reports from five different hospitals and a held-out sixth."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.progress import Track, untracked
from feddra_ds.data.sources.split import choose_validation, components
from feddra_ds.data.synthetic.image import render
from feddra_ds.data.synthetic.reports import write_report
from feddra_ds.data.synthetic.scene import HELD_OUT, KINDS, RARE_KIND, SITES, Site, Study, draw_study, generator

_FOLLOW_UP = 0.2  # of the patients have a second film
_PARALLEL_FROM = 400


@dataclass(frozen=True)
class SynthOptions:
    """num_pairs: over the five sites; the held-out site comes on top. image_size: side in pixels. val_fraction: share of
    each site's pairs for val. num_workers: processes that draw, None for one per core. The seed decides every byte."""

    num_pairs: int = 2000
    image_size: int = 128
    val_fraction: float = 0.2
    seed: int = 0
    num_workers: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class _Job:
    """One study to draw: everything that the picture and the report depend on."""

    seed: int
    site: Site
    study: Study
    film: int
    size: int


def synthesize(out: Path, options: SynthOptions, track: Track = untracked) -> dict[str, Counter[str]]:
    """Make the dataset at `out`; returns for every site how many of its pairs are train, val and test, how many are
    `normal`, and how many show the rare kind. Raises DataError.
    """
    counts: dict[str, Counter[str]] = {site.name: Counter() for site in (*SITES, HELD_OUT)}
    with DatasetWriter(out, overwrite=options.overwrite) as writer:
        writer.held_out.append(HELD_OUT.name)
        writer.info |= {
            "source": f"synthetic, seed {options.seed}",
            "sites": {site.name: site.title for site in (*SITES, HELD_OUT)},
            "label_names": list(KINDS),
            "image_size": options.image_size,
        }
        plan = [(job, split) for site, total in _sizes(options.num_pairs) for job, split in _plan(site, total, options)]
        workers = (os.cpu_count() or 1) if options.num_workers is None else options.num_workers
        drawn = zip(plan, _draw_all([job for job, _ in plan], workers), strict=True)
        for number, ((job, split), (image, text)) in enumerate(track(drawn, len(plan), "drawing")):
            site, info = job.site.name, job.study.info()
            writer.add(site, split, f"{site}-{number:06d}", image=image, suffix="png", text=text, info=info)
            counts[site] += Counter({split: 1, "normal": not job.study.findings, RARE_KIND: info["labels"][RARE_KIND]})
    return counts


def _sizes(num_pairs: int) -> list[tuple[Site, int]]:
    """Pairs of each site: `num_pairs` over the five by their shares, rounded so that the sum holds; the held-out on top."""
    exact = [site.share * num_pairs for site in SITES]
    sizes = [int(size) for size in exact]
    for i in sorted(range(len(SITES)), key=lambda i: sizes[i] - exact[i])[: num_pairs - sum(sizes)]:
        sizes[i] += 1
    return [*zip(SITES, sizes, strict=True), (HELD_OUT, max(2, round(HELD_OUT.share * num_pairs)))]


def _plan(site: Site, total: int, options: SynthOptions) -> Iterator[tuple[_Job, str]]:
    """The site's studies in the order of its shards, each with its split: test throughout for the held-out site."""
    patients: list[str] = []
    studies: list[Study] = []
    rng = generator("site", options.seed, site.name)
    while len(studies) < total:
        patient = f"{site.name}-p{len(set(patients)):05d}"
        first = draw_study(site, patient, rng)
        films = [first] if rng.random() >= _FOLLOW_UP else [first, _follow_up(site, first, rng)]
        for study in films[: total - len(studies)]:
            studies.append(study)
            patients.append(patient)
    groups = components([[patient] for patient in patients])
    validation = choose_validation([site.name] * total, groups, options.val_fraction, options.seed)
    for i in permutation(total, "synth", options.seed, site.name).tolist():
        split = "test" if site is HELD_OUT else "val" if validation[i] else "train"
        yield _Job(options.seed, site, studies[i], i, options.image_size), split


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
    text = write_report(study, job.site.style, generator("report", job.seed, study.patient, job.film))
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
