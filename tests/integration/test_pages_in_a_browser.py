"""The pages in a real browser, on a phone and a desk, light and dark: it has no complaint, texts are readable, things named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from run_helpers import add_model, make_config, make_data, make_line, make_run, robust_columns

from feddra_ds.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason=f"there is no browser here: {', '.join(browser.NAMES)}"),
]

PAGES = ("report", "runs", "search", "experiment")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each of the pages, with all that they may show."""
    work = tmp_path_factory.mktemp("pages")
    data = make_data(work / "data")
    lines = [make_line(r, **robust_columns(r)) for r in range(3)]
    lines[1]["excluded_clients"] = [{"id": "west", "reason": "its update is 12 times the median of the others"}]
    lines[2]["skipped_samples"]["north"] = {"corrupt_image": 3}
    runs = [work / "a_run_with_quite_a_long_name", work / "other"]
    for number, run in enumerate(runs):
        config = make_config(run, data, strategy={"name": ("feddra", "fedavg")[number]})
        make_run(run, config, lines)
        add_model(run / "model", config, seed=number)
        commands(f"evaluate {run} --bootstrap 20 --subgroup site,odd")
    commands(
        f"finetune {runs[0]} --epochs 1 --repeats 2 --fractions 0.5,1 --modes linear --device cpu",
        f"report {runs[0]} --out {work}/report.html",
        f"report {runs[0]} {runs[1]} --out {work}/runs.html",
        f"search report --model {runs[0]} --out {work}/search.html",
    )
    about = {"experiment": "x", "kind": "test", "status": "ok", "fingerprint": "x"}
    metrics = lambda arm, seed: {"recall@5": 0.2 + 0.01 * seed * len(arm), "worst_loss": 3.0 - 0.1 * seed}
    rows = [
        about | {"id": f"{arm}-{seed}", "arm": arm, "seed": seed, "metrics": metrics(arm, seed)}
        for arm in ("fedavg", "feddra")
        for seed in range(3)
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands(
        f"experiment table {work}/rows.jsonl --metrics recall@5,worst_loss --baseline fedavg --html {work}/experiment.html"
    )
    return work


def commands(*lines: str) -> None:
    for line in lines:
        assert main(line.split()) == 0, line


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    assert program is not None
    with browser.started(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_pleasant_everywhere(page: str, pages: Path, window: browser.Browser) -> None:
    found = {}
    for width in (400, 1280):
        for scheme in ("light", "dark"):
            window.open(pages / f"{page}.html", width, scheme)
            assert window.evaluate("innerWidth") == width
            assert window.evaluate(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
            wrong = [*window.complaints, *window.evaluate(browser.CHECK)]
            if wrong:
                found[f"{width} px, {scheme}"] = wrong
    assert found == {}


def test_what_is_wrong_is_found(tmp_path: Path, window: browser.Browser) -> None:
    """The check is one that can fail: each of its findings, on a page that is wrong in all of them."""
    (tmp_path / "bad.html").write_text(
        "<!doctype html><html><body><h1>a</h1><h3>b</h3><p style='color:#999;background:#fff'>grey</p>"
        "<p style='width:900px'>wide</p><img src='data:,'><svg role='img'></svg><section></section><a href='#'></a>"
        "<i id='x'></i><i id='x'></i><div class='scroll' style='overflow:auto;width:50px' tabindex='-1'>"
        "<p style='width:90px'>w</p></div><script>console.error('no')</script></body></html>"
    )
    window.open(tmp_path / "bad.html", 400, "light")
    told = "\n".join([*window.complaints, *window.evaluate(browser.CHECK)])
    for finding in ("contrast 2.85: grey", "pixels wider", "no title", "not one main", "without alt", "is not there",
                    "chart without a name", "region without a name", "no name: <a", "no key scrolls", "h3 below h1",
                    "an id that", "'no'"):  # fmt: skip
        assert finding in told, finding
