"""The report: whole, self-contained, escaped, and complete for every kind of run; its charts tell the numbers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import CLIENTS, HELD_OUT, add_model, make_config, make_data, make_line, make_run, robust_columns

from feddra_ds.cli import main
from feddra_ds.common.text import number, percent, size
from feddra_ds.evaluation.examples import NUM_IMAGES, NUM_TEXTS, retrieval_examples, thumbnail
from feddra_ds.evaluation.gallery import open_split
from feddra_ds.evaluation.models import open_models
from feddra_ds.report import charts
from feddra_ds.report.evaluation_charts import calibration_diagrams, reliability_diagram
from feddra_ds.run.files import open_run

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, collects attributes and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    config = make_config(run, data)
    lines = [make_line(r) for r in range(3)]
    lines[1]["excluded_clients"] = [{"id": "west", "reason": "loss <nan> & gone"}]
    lines[2]["skipped_samples"]["north"] = {"corrupt_image": 3}
    make_run(run, config, lines)
    add_model(run / "model", config)
    return run


def write(run: Path, *arguments: str) -> Page:
    assert main(["report", str(run), *arguments]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    return check_self_contained(text)


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert "<script" not in text
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "poster", "data"):
            assert value.startswith(("data:", "#")) or value == "", (tag, name, value)
        assert not name.startswith("on"), (tag, name)
    assert not re.search(r"url\(|@import|https?://", text.split("</style>")[0])
    assert "prefers-color-scheme: dark" in text
    return page


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = write(finished, "--examples", "3")
    told = capsys.readouterr().out
    assert f"wrote {finished}/report.html" in told
    assert f"Next:\n  open {finished}/report.html in a browser" in told
    text = page.text
    for expected in (
        "finished feddra · 3 of 3 rounds · 3 clients",
        "2.200 mean loss from 2.600; chance 2.773",
        "2.700 worst client's loss",
        "west has the highest loss (2.700), north the lowest (1.900).",
        "The weights p now range from 0.283 (north) to 0.433 (west)",
        "40 % recall@5, one gallery chance 31 % (× 1.3), 16 pairs",
        "Left out of the average in some round: west (reasons below).",
        "west loss <nan> & gone",
        "corrupt image 3",
        "west 12 0.333 0.433 2.700 no val pairs of its own",
        "north 12 0.333 0.283 1.900 8 14 / 70 / – 14 / 70 / – 12 / 62 / –",
        "1.2 MB sent per rank",
        "radius ρ 1",
    ):
        assert expected in text, expected
    assert text.count("its report is found at place") == 3
    assert text.count("its picture is found at place") == 3
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 3 + 3 * NUM_IMAGES
    assert all(value.startswith("data:image/jpeg;base64,") for value in pictures)
    assert "<b>report</b>" in text, "reports are shown as they are, not as markup"


def test_the_robust_gain_and_what_moved_the_weights(data: Path, tmp_path: Path) -> None:
    lines = [make_line(0), *(make_line(r, **robust_columns(r)) for r in (1, 2))]  # the first is of an older version
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", data), lines)
    text = write(run, "--examples", "0").text
    for expected in (
        "40 % of the robust gain attained Σ p L 2.300; mean 2.200, at most 2.450",
        "The mixture's loss Σ p L is 2.300, the mean 2.200, and the most that p could reach 2.450: "
        "p attains 40 % of the robust gain.",
        "The robust gain The loss of the mixture p",
        "client train pairs p first p next loss train loss val pairs",
        "west 12 0.333 0.433 2.700 ± 0.070 1.700 no val pairs of its own",
        "mean 2.200 1.600",
        "west 2 2 loss 1e+30, taken as 2.773",
        "north stage2 4",
    ):
        assert expected in text, expected
    assert "north stage1" not in text
    older = write(
        make_run(tmp_path / "old", make_config(tmp_path / "old", data), [make_line(0)]), "--examples", "0"
    ).text
    for new in ("robust gain", "train loss", "±", "not believed", "steps skipped"):
        assert new not in older
    level = make_line(
        1, **robust_columns(1) | {"robust_gain": {"mixture": 2.0, "mean": 2.0, "best": 2.0, "share": None}}
    )
    run = make_run(tmp_path / "level", make_config(tmp_path / "level", data), [level])
    assert "of the robust gain" not in write(run, "--examples", "0").text


def test_what_each_stage_takes(data: Path, tmp_path: Path) -> None:
    counted = {"stage_bytes_sent": {"stage1": 1000, "stage2": 30_000}, "stage_memory_bytes": {"stage2": 7 * 10**8}}
    more = {"stage_bytes_sent": {"stage1": 2000, "stage2": 20_000}, "stage_memory_bytes": {"stage2": 6 * 10**8}}
    slow = make_line(1)["stage_seconds"] | {"stage1": 4.0}
    lines = [
        make_line(0),
        make_line(1, **counted, stage_seconds=slow),
        make_line(2, **more),
    ]  # the first is of an older version
    text = write(make_run(tmp_path / "run", make_config(tmp_path / "run", data), lines), "--examples", "0").text
    assert (
        "stage seconds sent per rank memory stage 1 2.000 2.0 kB – stage 2 3.500 30.0 kB 700.0 MB averaging 0.100 – –"
        in text
    )


def test_the_distance_of_the_weights_has_the_bound_of_its_ball_alone(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", data), [make_line(2)])
    assert ", of at most ρ = 1." in write(run, "--examples", "0").text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["dro"] |= {"radius_share": 0.25}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert ", of at most ρ = 0.25." in write(run, "--examples", "0").text
    config["dro"] |= {"set": "kl"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = write(run, "--examples", "0").text
    assert "their distance from uniform is 0.0" in text
    assert "of at most ρ" not in text


def test_the_evaluation_section(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", data), [make_line(r) for r in range(3)])
    (run / "model").symlink_to(finished / "model")
    soft = f"feddra-ds evaluate {run} adds what the model is worth against chance"
    assert soft in write(run, "--examples", "0").text
    assert f"feddra-ds evaluate {run}   # for the report too" in capsys.readouterr().out

    for words in (["--clients", "north"], ["--shuffled-texts"]):
        main(["evaluate", str(run), "--bootstrap", "20", *words])
        assert not (run / "evaluation.json").exists(), "part of a run, or a control, is no evaluation of it"
    assert main(["evaluate", str(run / "model"), "--bootstrap", "20"]) == 0
    assert not (run / "evaluation.json").exists()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--bootstrap", "50"]) == 0
    assert f"kept in {run}/evaluation.json, which `feddra-ds report` shows" in capsys.readouterr().out

    told = json.loads((run / "evaluation.json").read_text())
    assert (told["round"], told["split"], told["data"]) == (2, "val", str(data))
    page = write(run, "--examples", "0")
    assert soft not in page.text
    assert "its 95 % interval, after round 2, on val of" in page.text
    assert "ended since" not in page.text
    for name, about in (*told["clients"].items(), ("all, one gallery", told["pooled"])):
        e = about["intervals"]["recall@1"]
        held_out = " held out, test" if name == HELD_OUT else ""
        shown = f"{percent(e['recall'])} ({percent(e['low'])} to {percent(e['high'])}) chance {percent(e['chance'])}"
        assert f"{name}{held_out} {about['pairs']} {shown} {e['verdict']}" in page.text
    assert "Without a val split, so not measured: west." in page.text
    assert (
        f"odd 25 {int(told['zero_shot']['odd']['pooled']['positives'])} {number(told['zero_shot']['odd']['pooled']['auroc'])}"
        in page.text
    )

    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make_line(3)) + "\n")
    assert "1 round ended since:" in write(run, "--examples", "0").text


def test_subgroups_and_calibration_are_drawn(finished: Path, data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", data), [make_line(0)])
    (run / "model").symlink_to(finished / "model")
    assert main(["evaluate", str(run), "--bootstrap", "20", "--subgroup", "site,odd"]) == 0
    page = write(run, "--examples", "0")
    told = json.loads((run / "evaluation.json").read_text())
    titles = [value for _, name, value in page.attributes if name == "title"]
    for field, values in told["subgroups"]["fields"].items():
        assert f"By {field} " in page.text
        for value, about in values.items():
            e = about["recall@5"]
            shown = f"recall@5 {percent(e['recall'])} % ({percent(e['low'])} to {percent(e['high'])})"
            assert f"{field} = {value}, {about['pairs']} pairs: {shown}, chance {percent(e['chance'])} %" in titles
    worst = told["subgroups"]["worst"]
    assert f"Furthest down, against chance: {worst['field']} = {worst['value']}, recall@5" in page.text
    names = [value for _, name, value in page.attributes if name == "aria-label"]
    for label in ("odd", "view"):
        assert f"Reliability diagram of {label}" in names
        assert f"{label} ECE {number(told['zero_shot'][label]['pooled']['calibration']['ece'])}" in page.text

    # an evaluation of an older version, and one without subgroups and labels
    for label in told["zero_shot"].values():
        del label["pooled"]["calibration"]
    del told["subgroups"]
    (run / "evaluation.json").write_text(json.dumps(told))
    assert "Calibration" not in write(run, "--examples", "0").text


def test_a_reliability_diagram_is_where_its_bins_are() -> None:
    bins = [
        {"confidence": 0.5, "accuracy": 0.25, "n": 30},
        {"confidence": 1.0, "accuracy": 1.0, "n": 10},
    ]
    drawn = str(reliability_diagram(bins, "a <label>"))
    assert 'aria-label="Reliability diagram of a &lt;label&gt;"' in drawn
    found = re.findall(r'<circle class="dot c0" cx="(.*?)" cy="(.*?)" r="(.*?)"', drawn)
    (x1, y1, r1), (x2, y2, r2) = (tuple(map(float, one)) for one in found)
    (across, end, corner, top) = map(float, re.search(r'dash" d="M(\S+) (\S+)L(\S+) (\S+)"', drawn).groups())  # type: ignore[union-attr]
    assert (x2, y2) == (corner, top), "sure and always right is the diagonal's upper end"
    assert (x1, y1) == ((across + corner) / 2, end + (top - end) / 4)
    assert y2 < y1, "more often right is further up"
    assert r1 > r2
    assert "30 pairs, said 0.50, right 0.25" in drawn


def test_the_labels_of_the_most_pairs_have_diagrams() -> None:
    label = lambda n: {
        "pooled": {"n": n, "calibration": {"ece": 0.1, "bins": [{"confidence": 1, "accuracy": 1, "n": n}]}}
    }
    told = {f"l{n}": label(n) for n in range(10)} | {"none": {"pooled": {"n": 99, "calibration": None}}}
    assert [one["label"] for one in calibration_diagrams(told)] == [f"l{n}" for n in range(4, 10)]


def test_every_cell_has_its_label_on_a_phone(finished: Path) -> None:
    assert main(["report", str(finished), "--examples", "0"]) == 0
    text = (finished / "report.html").read_text()
    for row in re.findall(r"<tbody>(.*?)</tbody>", text, re.S):
        for cells in re.findall(r"<tr.*?>(.*?)</tr>", row, re.S):
            for cell in re.findall(r"<td[^>]*>.*?</td>", cells, re.S)[1:]:
                assert re.match(r"<td( colspan| data-label=|></td>)", cell), cell


def test_a_page_without_examples_holds_no_pictures(finished: Path, tmp_path: Path) -> None:
    assert main(["report", str(finished), "--examples", "0", "--out", str(tmp_path / "page.html")]) == 0
    page = check_self_contained((tmp_path / "page.html").read_text())
    assert not [1 for tag, name, _ in page.attributes if (tag, name) == ("img", "src")]
    assert "They were left out (--examples 0)." in page.text


def test_runs_that_have_little_to_show(data: Path, tmp_path: Path) -> None:
    none = write(make_run(tmp_path / "none", make_config(tmp_path / "none", data), []))
    assert "No round has ended yet" in none.text
    assert "has neither a model/ nor a whole checkpoint yet" in none.text
    one = write(make_run(tmp_path / "one", make_config(tmp_path / "one", data), [make_line(0)]))
    assert "2.600 mean loss after one round; chance 2.773" in one.text
    blind = [make_line(r, val={}) for r in range(2)]
    blind = write(make_run(tmp_path / "blind", make_config(tmp_path / "blind", data), blind))
    assert blind.text.count("no evaluation yet") == 3
    assert "recall@5, one gallery" not in blind.text
    lost = [make_line(0), make_line(1, client_losses=[2.0, 2.1, None])]
    assert (
        "west 12 0.333 0.400 – no val pairs"
        in write(make_run(tmp_path / "lost", make_config(tmp_path / "lost", data), lost)).text
    )
    nobody = make_line(0, client_losses=[None] * 3, mean_loss=None, worst_loss=None, val={})
    assert (
        "mean – Evaluation against chance"
        in write(make_run(tmp_path / "nobody", make_config(tmp_path / "nobody", data), [nobody])).text
    )


def test_the_centralised_run_shows_its_members(data: Path, tmp_path: Path) -> None:
    line = make_line(0, ["pooled"], val=make_line(0)["val"])
    config = make_config(tmp_path / "run", data, strategy={"name": "centralized"})
    text = write(make_run(tmp_path / "run", config, [line])).text
    assert "pooled 36 1.000 1.000 2.700 no val pairs of its own" in text
    assert "north 12 – – – 8" in text


def test_many_clients_fold_into_the_colours_there_are(data: Path, tmp_path: Path) -> None:
    ids = [f"hospital_{i:02d}" for i in range(30)]
    config = make_config(tmp_path / "run", data)
    page = write(make_run(tmp_path / "run", config, [make_line(r, ids) for r in range(3)]))
    assert "Shown: the 12 lowest against it." in page.text
    legend = page.text[: page.text.index("Clients Recall")]
    assert (
        sum(f"hospital_{i:02d}" in legend.split("Retrieval per client")[0] for i in range(30)) <= charts.NUM_COLOURS + 2
    )


def test_a_run_that_is_not_here_any_more_has_no_examples(finished: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", tmp_path / "gone")
    run = make_run(tmp_path / "run", config, [make_line(0)])
    (run / "model").symlink_to(finished / "model")
    text = write(run).text
    assert "There are none: --data: is needed, because the run's data.root" in text
    assert "north – 0.333" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["RUN", "--out", "no/such/page.html"], "--out: no/such is not a folder"),
        (["RUN", "--examples", "-1"], "--examples: -1 is too small"),
        (["RUN", "--max-pairs", "1"], "--max-pairs: 1 is too small"),
    ],
)
def test_mistakes_have_one_line(
    finished: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(str(finished) if a == "RUN" else a for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_examples_are_the_best_and_count_matches(finished: Path, data: Path) -> None:
    models = open_models(finished, "cpu")
    dataset = open_split(models, str(data), "val", None)
    assert dataset.client_ids == [*CLIENTS, HELD_OUT]
    by_image, by_text, spoilt = retrieval_examples(models, dataset, "val", num_each=6, max_pairs=100, seed=0)
    assert spoilt == {}
    assert {e.client for e in by_image} == {"north", "south_and_the_islands", HELD_OUT}
    for example in by_image:
        scores = [f.score for f in example.found]
        assert scores == sorted(scores, reverse=True)
        assert len(example.found) == NUM_TEXTS
        assert len({f.text for f in example.found}) == NUM_TEXTS, "a text that two pairs share is shown once"
        assert example.gallery == 8 + 8 + 9 - 3
        places = [i for i, f in enumerate(example.found) if f.match]
        assert places == ([example.rank - 1] if example.rank <= NUM_TEXTS else [])
    for example in by_text:
        assert example.gallery == 25
        assert any(f.match for f in example.found) == (example.rank <= NUM_IMAGES)
        assert all(f.image for f in example.found)


def test_a_picture_that_cannot_be_read_has_no_thumbnail() -> None:
    assert thumbnail(b"nothing") is None


def test_lines_end_where_their_values_are() -> None:
    series = [
        charts.Series("a & b", [1.0, None, 3.0], "c0"),
        charts.Series("rest", [2.0, 2.0, 2.0], "muted", labelled=False),
    ]
    show = lambda v: f"{v:.1f} u"
    references = [("chance", 4.0)]
    svg = str(charts.line_chart(series, [0, 1, 2], title="t <1>", show=show, from_zero=True, references=references))
    assert svg.count("<svg") == 2
    assert "3.0 u a &amp; b" in svg
    assert "rest" not in svg
    assert "t &lt;1&gt;" in svg
    wide = svg.split('<div class="narrow">')[0]
    height = {name: float(y) for y, name in re.findall(r'y="([\d.]+)"[^>]*>([^<]+)</text>', wide)}
    assert height["3.0 u a &amp; b"] < height["0 u"], "up is more"
    points = re.search(r'class="line c0" d="M([\d. ]+)L([\d. ]+)"', wide)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, p.split()) for p in points.groups())
    zero, four = (height[t] - 4 for t in ("0 u", "4 u"))
    assert (zero - y0) / (zero - four) == pytest.approx(1 / 4, abs=0.01)
    assert (zero - y1) / (zero - four) == pytest.approx(3 / 4, abs=0.01)
    assert x1 > x0


def test_charts_of_nothing_say_so() -> None:
    empty = charts.line_chart([charts.Series("a", [None], "c0")], [0], title="t", show=number)
    assert "nothing was measured yet" in empty
    assert "nothing was measured yet" in charts.stacked_bars([("a", [])], [], title="t", unit="s")


def test_long_runs_stay_small_and_keep_their_end() -> None:
    n = 5000
    series = [charts.Series(f"s{i}", [float(r) for r in range(n)], "c0") for i in range(7)]
    svg = charts.line_chart(series, list(range(n)), title="t", show=number)
    assert len(svg) < 120_000
    assert "4999.0 s0" in svg
    bars = charts.stacked_bars([("a", [1.0] * n)], list(range(n)), title="t", unit="s")
    assert bars.count("<rect") <= 80
    assert "round 0–124, a: 1 s" in bars


def test_labels_never_overlap() -> None:
    placed = charts._spread([(50.0, str(i), "c0") for i in range(12)], 16, 244, 14)
    heights = [y for y, _, _ in placed]
    assert all(b - a >= 14 - 1e-9 for a, b in pairwise(heights))
    assert max(heights) <= 244


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (5.4, 6.4, [5.25, 5.5, 5.75, 6, 6.25, 6.5]), (2, 2, [2, 2.05, 2.1, 2.15, 2.2])],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, 5) == pytest.approx(expected)


def test_numbers_for_reading() -> None:
    assert [number(x) for x in (None, 1.23456, 12.345)] == ["–", "1.235", "12.3"]
    assert [percent(x) for x in (None, 0.0, 0.034, 0.5, 1.0)] == ["–", "0", "3.4", "50", "100"]
    assert [size(x) for x in (12, 1234, 5.5e6, 2e12)] == ["12 B", "1.2 kB", "5.5 MB", "2000.0 GB"]


def test_a_run_reads_its_newest_results(data: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [make_line(0), make_line(1), make_line(2, val={})]
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", data), lines)
    text = write(run).text
    assert "on val after round 1;" in text
    assert open_run(run).rounds_done == 3
