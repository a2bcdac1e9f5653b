"""`feddra-ds data synth`: radiograph-like pictures with reports from five different hospitals and a held-out sixth."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from feddra_ds.common.console import guarded, next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.data.loading.order import permutation
from feddra_ds.data.sources.split import choose_validation, components
from feddra_ds.data.synthetic.image import render
from feddra_ds.data.synthetic.reports import write_report
from feddra_ds.data.synthetic.scene import HELD_OUT, KINDS, RARE_KIND, SITES, Site, Study, draw_study, generator

_FOLLOW_UP = 0.2  # of the patients have a second film
_PARALLEL_FROM = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data synth`."""
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--num-pairs", type=int, default=2000, metavar="N", help="pairs over the five sites; the held-out site has "
        f"{HELD_OUT.share:.0%}% more (default %(default)s)")  # fmt: skip
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed; the same seed gives the same bytes (default %(default)s)",
    )
    add("--image-size", type=int, default=128, metavar="N", help="side of the pictures in pixels (default %(default)s)")
    add(
        "--val-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="share of each site's pairs for val (default %(default)s)",
    )
    add("--num-workers", type=int, metavar="N", help="processes that draw (default: one per core)")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")


@dataclass(frozen=True)
class _Job:
    """One study to draw: everything that the picture and the report depend on."""

    seed: int
    site: Site
    study: Study
    film: int
    size: int


@guarded
def run(args: argparse.Namespace) -> int:
    """Make the dataset; prints a table of sites. Returns 0, or 2 with the problems on stderr."""
    problems = []
    if args.num_pairs < 20:
        problems.append(f"--num-pairs: must be at least 20, got {args.num_pairs}")
    if not 16 <= args.image_size <= 2048:
        problems.append(f"--image-size: must be from 16 to 2048, got {args.image_size}")
    if not 0 < args.val_fraction < 1:
        problems.append(f"--val-fraction: must be above 0 and below 1, got {args.val_fraction}")
    if problems:
        raise DataError(problems)

    rows: list[tuple[object, ...]] = []
    with DatasetWriter(args.out, overwrite=args.overwrite) as writer:
        writer.held_out.append(HELD_OUT.name)
        writer.info |= {
            "source": f"synthetic, seed {args.seed}",
            "sites": {site.name: site.title for site in (*SITES, HELD_OUT)},
            "label_names": list(KINDS),
            "image_size": args.image_size,
        }
        plan = [(job, site, split) for site, total in _sizes(args.num_pairs) for job, split in _plan(site, total, args)]
        workers = (os.cpu_count() or 1) if args.num_workers is None else args.num_workers
        drawn = _draw_all([job for job, _, _ in plan], workers)
        counts: dict[str, dict[str, int]] = {}
        for number, ((job, site, split), (image, text)) in enumerate(
            track(zip(plan, drawn, strict=True), len(plan), "drawing")
        ):
            info = job.study.info()
            writer.add(site.name, split, f"{site.name}-{number:06d}", image=image, suffix="png", text=text, info=info)
            tally = counts.setdefault(site.name, dict.fromkeys(("train", "val", "test", "normal", RARE_KIND), 0))
            tally[split] += 1
            tally["normal"] += not job.study.findings
            tally[RARE_KIND] += info["labels"][RARE_KIND]
        for site in (*SITES, HELD_OUT):
            t = counts[site.name]
            rows.append((site.name, t["train"], t["val"], t["test"], t["normal"], t[RARE_KIND], site.style))
    print_table(
        f"{args.out}", ["site", "train", "val", "held out", "normal", f"{RARE_KIND} (rare)", "report style"], rows
    )
    next_step(
        f"feddra-ds data inspect {args.out}",
        f"feddra-ds train --config quickstart --data.root {args.out} --run.output_dir runs/{Path(args.out).name}",
    )
    return 0


def _sizes(num_pairs: int) -> list[tuple[Site, int]]:
    """Pairs of each site: `num_pairs` over the five by their shares, rounded so that the sum holds; the held-out on top."""
    exact = [site.share * num_pairs for site in SITES]
    sizes = [int(size) for size in exact]
    for i in sorted(range(len(SITES)), key=lambda i: sizes[i] - exact[i])[: num_pairs - sum(sizes)]:
        sizes[i] += 1
    return [*zip(SITES, sizes, strict=True), (HELD_OUT, max(2, round(HELD_OUT.share * num_pairs)))]


def _plan(site: Site, total: int, args: argparse.Namespace) -> Iterator[tuple[_Job, str]]:
    """The site's studies in the order of its shards, each with its split: test throughout for the held-out site."""
    patients: list[str] = []
    studies: list[Study] = []
    rng = generator("site", args.seed, site.name)
    while len(studies) < total:
        patient = f"{site.name}-p{len(set(patients)):05d}"
        first = draw_study(site, patient, rng)
        films = [first] if rng.random() >= _FOLLOW_UP else [first, _follow_up(site, first, rng)]
        for study in films[: total - len(studies)]:
            studies.append(study)
            patients.append(patient)
    groups = components([[patient] for patient in patients])
    validation = choose_validation([site.name] * total, groups, args.val_fraction, args.seed)
    for i in permutation(total, "synth", args.seed, site.name).tolist():
        split = "test" if site is HELD_OUT else "val" if validation[i] else "train"
        yield _Job(args.seed, site, studies[i], i, args.image_size), split


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

    Not a multiprocessing pool: its children import the caller's main module, and one that fails is started for ever.
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
            with contextlib.suppress(BrokenPipeError):  # it has died: said below, where its first result is missing
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
