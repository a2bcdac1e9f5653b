"""Synthetic hospitals: the pictures show what the labels say, the reports tell it, the sites differ as they should."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feddra_ds.cli import main
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.synthetic import hospitals
from feddra_ds.data.synthetic.image import _anatomy, render
from feddra_ds.data.synthetic.reports import write_report
from feddra_ds.data.synthetic.scene import (
    HELD_OUT,
    KINDS,
    RARE_KIND,
    SEVERITIES,
    SITES,
    Finding,
    Scanner,
    Study,
    draw_study,
    generator,
)
from feddra_ds.data.synthetic.sites import Heterogeneity, make_sites


def run(*words: str) -> int:
    return main(["data", "synth", *words])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("synth") / "data"
    assert run("--out", str(out), "--num-pairs", "600", "--image-size", "32", "--num-workers", "2") == 0
    return open_dataset(out)


def infos(dataset: Dataset, client: str) -> list[dict]:
    parts = [dataset.samples(client, split) for split in dataset.splits(client)]
    return [part.read_info(i) for part in parts for i in range(len(part))]


def test_five_sites_of_different_size_and_a_held_out_sixth(dataset: Dataset) -> None:
    assert len(dataset.client_ids) == 5
    assert dataset.held_out == [HELD_OUT.name]
    sizes = {c: dataset.num_samples(c, "train") + dataset.num_samples(c, "val") for c in dataset.client_ids}
    assert sizes == {site.name: round(site.share * 600) for site in SITES}
    for client in dataset.client_ids:
        assert dataset.num_samples(client, "val") == pytest.approx(0.2 * sizes[client], abs=2)
    assert dataset.splits(HELD_OUT.name) == ["test"]
    assert dataset.num_samples(HELD_OUT.name, "test") == 90


@pytest.mark.parametrize("num_pairs", [20, 61, 100, 1999])
def test_the_number_of_pairs_is_what_was_asked_for(num_pairs: int) -> None:
    options = hospitals.SynthOptions(num_pairs=num_pairs)
    sizes = [size for site, size in hospitals._sizes((*SITES, HELD_OUT), options) if site is not HELD_OUT]
    assert sum(sizes) == num_pairs
    assert min(sizes) >= 1


def test_patients_are_on_one_side(dataset: Dataset) -> None:
    for client in dataset.client_ids:
        train, val = ({dataset.samples(client, s).read_info(i)["patient"] for i in range(dataset.num_samples(client, s))}
                      for s in ("train", "val"))  # fmt: skip
        assert not train & val
        assert len(train) < dataset.num_samples(client, "train"), "some patients have two films"


def test_only_the_small_site_sees_the_rare_finding(dataset: Dataset) -> None:
    counts = {c: sum(info["labels"][RARE_KIND] for info in infos(dataset, c)) for c in dataset.client_ids}
    owner = min(SITES, key=lambda site: site.share).name
    assert counts.pop(owner) >= 10
    assert set(counts.values()) == {0}
    assert sum(info["labels"][RARE_KIND] for info in infos(dataset, HELD_OUT.name)) > 0


def test_label_mixes_differ(dataset: Dataset) -> None:
    shares = {}
    for client in dataset.client_ids:
        own = infos(dataset, client)
        shares[client] = np.array([np.mean([info["labels"][kind] for info in own]) for kind in KINDS])
    for a in shares:
        for b in shares:
            assert a == b or np.abs(shares[a] - shares[b]).sum() > 0.3, (a, b)


def test_ground_truth_is_complete(dataset: Dataset) -> None:
    for info in infos(dataset, dataset.client_ids[0]):
        assert {kind for kind, present in info["labels"].items() if present} == {f["kind"] for f in info["findings"]}
        assert set(info["labels"]) == set(KINDS)
        for finding in info["findings"]:
            sides, zones = KINDS[finding["kind"]]
            assert finding["side"] in sides
            assert finding["zone"] in zones
            assert finding["severity"] in SEVERITIES
            assert (finding["size_mm"] is not None) == (finding["kind"] in ("nodule", "cavity"))


def test_the_seed_gives_the_same_bytes_for_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hospitals, "_PARALLEL_FROM", 10)
    for name, workers, seed in (("one", "1", "3"), ("two", "2", "3"), ("other", "1", "4")):
        words = ["--num-pairs", "60", "--image-size", "16", "--num-workers", workers, "--seed", seed]
        assert run("--out", str(tmp_path / name), *words) == 0
    index = [(tmp_path / n / "heart_centre" / "index.json").read_bytes() for n in ("one", "two", "other")]
    assert index[0] == index[1]
    assert index[0] != index[2]


def test_pictures_have_the_asked_size(dataset: Dataset) -> None:
    part = dataset.samples(dataset.client_ids[0], "train")
    image = Image.open(io.BytesIO(part.read_image(0)))
    assert (image.size, image.mode, image.format) == ((32, 32), "L", "PNG")


# --- heterogeneity ---------------------------------------------------------------------------------------------------


MOSTLY_HEART = ("--sizes", "1,1,1,16,1")


def made(tmp_path: Path, *words: str, pairs: int = 120) -> Dataset:
    out = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
    sizes = ["--num-pairs", str(pairs), "--image-size", "16", "--num-workers", "1"]
    assert run("--out", str(out), *sizes, *words) == 0
    return open_dataset(out)


def part_of(dataset: Dataset, client: str, split: str) -> list[tuple[bytes | None, str, dict]]:
    samples = dataset.samples(client, split)
    return [
        (samples.read_image(i), (samples.read_text(i) or b"").decode(), samples.read_info(i))
        for i in range(len(samples))
    ]


def test_the_defaults_tell_what_they_always_told(tmp_path: Path) -> None:
    """Without any option the reports and truths are those of before there were options."""
    dataset = made(tmp_path, "--seed", "5", pairs=40)
    parts = [(c, split) for c in (*dataset.client_ids, HELD_OUT.name) for split in dataset.splits(c)]
    told = [(c, split, text, info) for c, split in parts for _, text, info in part_of(dataset, c, split)]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] == "d64e1921d468c7d9"


def test_label_shift_none_is_one_mix_and_a_small_alpha_is_many() -> None:
    def spread(alpha: float) -> float:
        """How far the sites' shares of findings lie apart, drawn from 300 studies each."""
        shares = []
        for site in make_sites(Heterogeneity(label_shift=alpha), 0):
            rng = generator(site.name)
            seen = [draw_study(site, "p", rng).info()["labels"] for _ in range(300)]
            shares.append([np.mean([labels[kind] for labels in seen]) for kind in KINDS])
        return float(np.std(shares, axis=0).sum())

    one, some, many = spread(np.inf), spread(1.0), spread(0.1)
    assert one < 0.3 < some < many


def test_sizes_are_those_asked_for(tmp_path: Path) -> None:
    even = made(tmp_path, "--sizes", "even", pairs=100)
    assert {len(infos(even, c)) for c in even.client_ids} == {20}
    given = make_sites(Heterogeneity(sizes=(1, 1, 2, 2, 4)), 0)
    assert [site.share for site in given] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.4])


def test_shifts_of_style_and_scanner_can_be_turned_off() -> None:
    alike = make_sites(Heterogeneity(style_shift=False, scanner_shift=0.0), 0)
    assert {site.style for site in alike} == {HELD_OUT.style}
    assert {site.scanner for site in alike} == {HELD_OUT.scanner}
    assert {site.portable for site in alike} == {HELD_OUT.portable}
    half = make_sites(Heterogeneity(scanner_shift=0.5), 0)[0].scanner
    assert half.contrast == pytest.approx((SITES[0].scanner.contrast + HELD_OUT.scanner.contrast) / 2)
    assert make_sites(Heterogeneity(), 7) == SITES


def test_test_pairs_come_on_top_and_share_no_patient(tmp_path: Path) -> None:
    plain, tested = made(tmp_path, pairs=100), made(tmp_path, "--test-pairs", "30", pairs=100)
    for client in plain.client_ids:
        for split in ("train", "val"):
            assert part_of(plain, client, split) == part_of(tested, client, split)
        assert tested.num_samples(client, "test") == 30
        patients = {
            split: {info["patient"] for *_, info in part_of(tested, client, split)} for split in tested.splits(client)
        }
        assert not patients["test"] & (patients["train"] | patients["val"])
    assert tested.num_samples(HELD_OUT.name, "test") == 30


def test_label_noise_gives_reports_of_other_studies_but_not_in_test(tmp_path: Path) -> None:
    clean = made(tmp_path, "--test-pairs", "8", *MOSTLY_HEART)
    noisy = made(tmp_path, "--test-pairs", "8", *MOSTLY_HEART, "--label-noise", "0.25", "heart_centre")
    for client in clean.client_ids:
        for split in ("train", "val", "test"):
            pairs = list(zip(part_of(clean, client, split), part_of(noisy, client, split), strict=True))
            assert all(a[0] == b[0] for a, b in pairs), "the pictures stay"
            said = [b[2].get("report") == "of another study" for _, b in pairs]
            assert [a[1] != b[1] for a, b in pairs] == said or client == "heart_centre"
            if client != "heart_centre" or split == "test":
                assert not any(said)
    own = [info.get("report") for split in ("train", "val") for *_, info in part_of(noisy, "heart_centre", split)]
    assert own.count("of another study") == round(0.25 * len(own))
    reports = sorted(text for split in ("train", "val") for _, text, _ in part_of(noisy, "heart_centre", split))
    assert reports == sorted(text for split in ("train", "val") for _, text, _ in part_of(clean, "heart_centre", split))


def test_a_hard_sites_reports_say_nothing_and_are_nearly_all_different(tmp_path: Path) -> None:
    hard = made(tmp_path, "--test-pairs", "60", *MOSTLY_HEART, "--hard-site", "heart_centre", "0.6")
    for split in ("train", "test"):
        pairs = part_of(hard, "heart_centre", split)
        vague = [text for _, text, info in pairs if info.get("report") == "vague"]
        assert 0.35 < len(vague) / len(pairs) < 0.85
        assert len(set(vague)) > 0.95 * len(vague)
        assert not any(name in text.lower() for text in vague for names in NAMES.values() for name in names)
    assert not any("report" in info for info in infos(hard, "community_clinic"))


def test_dataset_json_says_what_was_asked_for(tmp_path: Path) -> None:
    assert "heterogeneity" not in made(tmp_path, pairs=20).info
    told = made(tmp_path, "--label-shift", "none", "--label-noise", "0.1", pairs=20).info["heterogeneity"]
    assert told["label_shift"] == "none"
    assert told["label_noise"] == {site.name: 0.1 for site in SITES}


# --- pictures --------------------------------------------------------------------------------------------------------

NORMAL = Study("s", "p", 50, "M", "PA", 0.46, ())
CLEAN = Scanner(noise=0.0)


def picture(*findings: Finding, heart: float = 0.46, film: int = 0, size: int = 96) -> np.ndarray:
    study = dataclasses.replace(NORMAL, findings=findings, heart_ratio=heart)
    return render(study, CLEAN, size, generator("body", 1), generator("film", film)).astype(int)


ALL = [
    Finding(kind, side, zone, severity, {"nodule": 20, "cavity": 40}.get(kind))
    for kind, (sides, zones) in KINDS.items()
    for side in sides
    for zone in zones
    for severity in ("mild", "severe")
    if kind != "cardiomegaly"
]


@pytest.mark.parametrize("finding", ALL, ids=lambda f: f"{f.kind}-{f.side}-{f.zone}-{f.severity}")
def test_a_finding_shows_where_it_is_said_to_be(finding: Finding) -> None:
    """Changed pixels lie on the said side (the patient's right is the picture's left) and at the said height."""
    change = np.abs(picture(finding) - picture())
    assert change.max() > 25, "it can be seen"
    left, right = change[:, :48].sum(), change[:, 48:].sum()
    if finding.side == "both":
        assert 0.2 < left / (left + right) < 0.8
    else:
        share = right / (left + right)
        assert share > 0.7 if finding.side == "left" else share < 0.3
    height = (change.sum(axis=1) * np.arange(96)).sum() / change.sum() / 96
    low, high = {"upper": (0.1, 0.45), "mid": (0.3, 0.6), "lower": (0.45, 0.85), "": (0.2, 0.8)}[finding.zone]
    assert low < height < (0.6 if finding.kind in ("pneumothorax", "pacemaker") else high)


def test_severity_can_be_seen() -> None:
    for kind, (sides, zones) in KINDS.items():
        if kind in ("cardiomegaly", "pacemaker"):
            continue
        sizes = dict(zip(SEVERITIES, (9, 18, 28), strict=True)) if kind in ("nodule", "cavity") else {}
        amounts = [
            np.abs(picture(Finding(kind, sides[0], zones[-1], s, sizes.get(s))) - picture()).sum() for s in SEVERITIES
        ]
        assert amounts[0] < amounts[1] < amounts[2], (kind, amounts)
    widths = [np.abs(picture(heart=ratio) - picture()).sum() for ratio in (0.55, 0.61, 0.68)]
    assert widths[0] < widths[1] < widths[2]


def test_two_films_of_a_patient_are_the_same_body() -> None:
    def body(patient: int, film: int) -> tuple[float, float]:
        anatomy = _anatomy(NORMAL, 32, generator("body", patient), generator("film", film), generator("play", film))
        return anatomy.width, anatomy.top

    assert body(1, 0) == body(1, 1) != body(2, 0)
    assert np.array_equal(picture(film=0), picture(film=0))
    assert not np.array_equal(picture(film=0), picture(film=1))


def test_scanners_look_different() -> None:
    pictures = [render(NORMAL, s.scanner, 64, generator(1), generator(2)).astype(float) for s in (*SITES, HELD_OUT)]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(one - other).mean() > 4


# --- reports ---------------------------------------------------------------------------------------------------------

NAMES = {
    "consolidation": ("consolidation", "opacity", "infiltrate", "pneumonia"),
    "nodule": ("nodule", "round"),
    "effusion": ("effusion", "fluid"),
    "pneumothorax": ("pneumothorax",),
    "atelectasis": ("atelectasis",),
    "cardiomegaly": ("cardiomegaly", "enlarge"),
    "edema": ("edema",),
    "fibrosis": ("fibrosis", "fibrotic"),
    "pacemaker": ("pacemaker",),
    "cavity": ("cavity", "cavitary"),
}


@pytest.mark.parametrize("style", ["structured", "terse", "narrative", "measured", "classic", "mixed"])
def test_reports_tell_every_finding_and_its_place(style: str) -> None:
    for seed in range(60):
        study = draw_study(HELD_OUT, "p", generator("study", seed))
        report = write_report(study, style, generator("report", seed)).lower()
        positive = report.split("no ")[0] if not study.findings else report
        for finding in study.findings:
            assert any(name in report for name in NAMES[finding.kind]), (finding, report)
            if finding.zone and finding.kind not in ("effusion", "pneumothorax", "pacemaker"):
                assert finding.zone in report, (finding, report)
            if finding.side != "both" and finding.kind != "pacemaker":
                assert finding.side in report, (finding, report)
            if finding.size_mm:
                assert f"{finding.size_mm} mm" in report, (finding, report)
        if not study.findings:
            assert not any(n in positive for n in ("severe", "moderate", "left", "right")), report


def test_absent_kinds_are_never_affirmed() -> None:
    for seed in range(40):
        study = draw_study(SITES[seed % 5], "p", generator("study", seed))
        report = write_report(study, SITES[seed % 5].style, generator("report", seed)).lower()
        if "pneumothorax" in report and not any(f.kind == "pneumothorax" for f in study.findings):
            before = report.split("pneumothorax")[0][-45:]
            assert "no " in before or "pneumothorax absent" in report, report


def test_reports_vary_and_styles_differ() -> None:
    study = dataclasses.replace(NORMAL, findings=(Finding("effusion", "left", "lower", "moderate"),))
    for site in SITES:
        texts = {write_report(study, site.style, generator(n)) for n in range(40)}
        assert len(texts) > 8, site.style
    firsts = Counter(write_report(study, site.style, generator(0)).split()[0] for site in SITES)
    assert len(firsts) >= 4


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-pairs", "5"], "--num-pairs: must be at least 20, got 5"),
        (["--image-size", "8"], "--image-size: must be from 16 to 2048, got 8"),
        (["--val-fraction", "1"], "--val-fraction: must be above 0 and below 1, got 1.0"),
        (["--test-pairs", "1"], "--test-pairs: must be at least 2, got 1"),
        (["--label-shift", "0"], "--label-shift: must be above 0, or none for one mix at all sites, got 0.0"),
        (["--scanner-shift", "2"], "--scanner-shift: must be on, off, or a strength from 0 to 1, got 2.0"),
        (["--sizes", "1,2"], "--sizes: must be 5 shares above 0, got 1.0, 2.0"),
        (["--label-noise", "a"], "--label-noise: must give a share from 0 to 1, got a"),
        (["--label-noise", "0.1", "a", "b"], "--label-noise: takes a share and at most one site, got 0.1 a b"),
        (
            ["--label-noise", "2", "heart_centre"],
            "--label-noise: the share of heart_centre must be from 0 to 1, got 2.0",
        ),
        (
            ["--hard-site", "mars", "0.5"],
            "--hard-site: there is no site mars; there are: university_hospital, "
            "emergency_department, community_clinic, heart_centre, lung_sanatorium",
        ),
    ],
)
def test_mistakes_have_one_clear_line(tmp_path: Path, capsys, words: list[str], message: str) -> None:
    assert run("--out", str(tmp_path / "out"), *words) == 2
    assert capsys.readouterr().err.strip() == f"feddra-ds: {message}"
    assert not (tmp_path / "out").exists()


def test_a_drawing_process_that_dies_is_said(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "_PARALLEL_FROM", 10)
    monkeypatch.setattr(hospitals.sys, "executable", "/bin/false")
    status = run("--out", str(tmp_path / "out"), "--num-pairs", "50", "--image-size", "16", "--num-workers", "2")
    assert status == 2
    assert "--num-workers: a drawing process ended with status 1; try --num-workers 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
