"""Tables and pictures of rows whose numbers are known."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from feddra_ds.cli import main
from feddra_ds.experiments.compare import as_csv, choose_rows, compare, markdown
from feddra_ds.experiments.measure import loss_metrics, mixture_metrics, retrieval_metrics, round_metrics
from feddra_ds.experiments.plot import draw

VALUES = {
    "plain": [0.30, 0.32, 0.29, 0.35, 0.31],
    "robust": [0.34, 0.35, 0.33, 0.38, 0.36],
    "odd & <new>": [0.28, 0.40, 0.21, 0.33, 0.30],
}


def rows(kind: str = "test") -> list[dict[str, Any]]:
    return [
        {"experiment": "e", "id": f"{arm}-{seed}", "arm": arm, "seed": seed, "kind": kind, "status": "ok",
         "fingerprint": "f", "metrics": {"recall@5": value, "loss": 10 * value}}
        for arm, values in VALUES.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_means_differences_and_corrected_p_values_are_scipys() -> None:
    found = compare(rows(), ["recall@5"], "plain")
    raw = {}
    for arm, values in VALUES.items():
        cell = found.cells[arm, "recall@5"]
        half = stats.t.ppf(0.975, 4) * np.std(values, ddof=1) / 5**0.5
        assert cell.mean.mean == pytest.approx(np.mean(values))
        assert cell.mean.high == pytest.approx(np.mean(values) + half)
        if arm != "plain":
            expected = stats.ttest_rel(values, VALUES["plain"])
            interval = expected.confidence_interval(0.95)
            assert cell.difference is not None
            assert (cell.difference.low, cell.difference.high) == (
                pytest.approx(interval.low),
                pytest.approx(interval.high),
            )
            assert cell.difference.p_value == pytest.approx(expected.pvalue)
            raw[arm] = expected.pvalue
    small, large = sorted(raw, key=lambda arm: raw[arm])
    assert found.cells[small, "recall@5"].adjusted_p == pytest.approx(2 * raw[small])
    assert found.cells[large, "recall@5"].adjusted_p == pytest.approx(max(2 * raw[small], raw[large]))


def test_markdown_says_what_is_sure() -> None:
    text = markdown(compare(rows(), ["recall@5", "loss"], "plain"))
    assert "over 5 test seeds (0, 1, 2, 3, 4)" in text
    assert "| plain | 31.4 ± 2.9 | 3.140 ± 0.286 |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| robust | **")]
    assert line.startswith("| robust | **+3.8** [+2.8, +4.8], p ")


def test_only_seeds_that_both_have_are_paired_and_crashes_are_named() -> None:
    some = rows()
    some[0] |= {"status": "crashed", "reason": "x"}
    found = compare(some, ["recall@5"], "plain")
    assert found.cells["plain", "recall@5"].mean.n == 4
    difference = found.cells["robust", "recall@5"].difference
    assert difference is not None
    assert difference.n == 4
    text = markdown(found)
    assert "(n = 4)" in text
    assert "Crashed: plain (seeds 0)." in text


def test_each_arm_stands_beside_its_own_control() -> None:
    found = compare(rows(), ["recall@5"], {"robust": "plain", "plain": "odd & <new>", "gone": "robust"})
    cell = found.cells["robust", "recall@5"]
    assert cell.difference is not None
    assert cell.difference.mean == pytest.approx(np.mean(VALUES["robust"]) - np.mean(VALUES["plain"]))
    assert found.cells["odd & <new>", "recall@5"].difference is None
    assert "gone" not in found.arms
    text = markdown(found)
    assert "Difference to the arm's own control, seed by seed" in text
    assert "p by Holm over the 2 comparisons" in text
    assert "odd & <new>" not in text.split("Difference")[1]
    assert draw(found, "recall@5").count('class="b"') == 0


def test_kinds_of_seeds_are_never_mixed_and_the_last_row_counts() -> None:
    dev = [row | {"id": f"dev-{row['id']}"} for row in rows("dev")]
    assert {row["kind"] for row in choose_rows([*dev, *rows()], None)} == {"test"}
    assert {row["kind"] for row in choose_rows([*dev, *rows()], "dev")} == {"dev"}
    assert {row["kind"] for row in choose_rows(dev, None)} == {"dev"}
    again = rows()[0] | {"metrics": {"recall@5": 0.9}}
    (first,) = [row for row in choose_rows([*rows(), again], None) if row["id"] == again["id"]]
    assert first["metrics"]["recall@5"] == 0.9
    assert choose_rows(rows(), None, {"plain-0": "f", "plain-1": "other"}) == rows()[:1]


def test_csv_holds_every_seed() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(compare(rows(), ["recall@5"], "plain")))))
    assert [line["arm"] for line in lines] == list(VALUES)
    assert lines[1]["values"] == "0:0.34 1:0.35 2:0.33 3:0.38 4:0.36"
    assert float(lines[1]["difference"]) == pytest.approx(0.038)
    assert lines[0]["difference"] == ""


def test_the_picture_is_svg_with_a_point_a_seed() -> None:
    root = ET.fromstring(draw(compare(rows(), ["recall@5"], "plain"), "recall@5"))
    circles = [e for e in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert sum(e.get("class") == "s" for e in circles) == 15
    assert sum(e.get("class") == "m" for e in circles) == 3
    assert "odd & <new>" in [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_commands_read_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    options = ["--baseline", "plain", "--metrics", "recall@5"]
    assert main(["experiment", "table", str(tmp_path), *options]) == 0
    assert "| robust | **+3.8**" in capsys.readouterr().out
    assert main(["experiment", "table", str(tmp_path), *options, "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == ""
    page = (tmp_path / "page.html").read_text()
    for expected in ("<td>robust</td>", "<b>+3.8</b>", "odd &amp; &lt;new&gt;", "Difference to plain, seed by seed"):
        assert expected in page
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert main(["experiment", "plot", str(tmp_path), *options, "--to", str(tmp_path / "svg")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "svg" / "recall_5.svg")]
    assert main(["experiment", "table", str(tmp_path), "--metrics", "recal@5"]) == 2
    assert "no row has recal@5; there are: loss, recall@5" in capsys.readouterr().err
    assert main(["experiment", "table", str(tmp_path), "--baseline", "x"]) == 2
    assert "no row is of arm x" in capsys.readouterr().err
    assert main(["experiment", "table", str(tmp_path / "gone.jsonl")]) == 2
    assert "there are no rows" in capsys.readouterr().err


def test_metrics_of_an_evaluation() -> None:
    about = lambda a, b, held_out: {"held_out": held_out, "i2t_recall@1": a, "t2i_recall@1": b, "i2t_recall@5": 2 * a,
                                    "t2i_recall@5": 2 * b}  # fmt: skip
    result = {"clients": {"a": about(0.1, 0.3, False), "b": about(0.1, 0.1, False), "c": about(0.2, 0.2, True)},
              "pooled": about(0.05, 0.15, False), "worst_mixture": {"loss": 3.5, "recall@5": 0.2, "p": [1, 0]}}  # fmt: skip
    found = retrieval_metrics(result) | mixture_metrics(result)
    expected = {"recall@5": 0.3, "worst_recall@5": 0.2, "spread_recall@5": 0.2, "held_out_recall@5": 0.4,
                "pooled_recall@1": 0.1, "recall@1/a": 0.2, "worst_mixture_loss": 3.5, "worst_mixture_recall@5": 0.2}  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "worst_mixture_p" not in found
    losses = loss_metrics(result | {"worst_mixture": {"losses": {"a": 2.0, "b": 3.0, "c": 9.0}}})
    assert losses == {"loss/a": 2.0, "loss/b": 3.0, "loss/c": 9.0, "loss": 2.5, "worst_loss": 3.0}
    line = {
        "client_ids": ["a", "b"],
        "client_weights": [0.5, 0.5],
        "next_client_weights": [0.3, 0.7],
        "client_losses": [1.5, 0.5],
        "client_train_losses": [1.25, None],
        "bytes_sent_per_rank": 2_500_000,
    }
    assert round_metrics(line) == {
        "p/a": 0.3,
        "p/b": 0.7,
        "largest_p": 0.7,
        "train_loss": 1.25,
        "worst_train_loss": 1.25,
        "mb_sent": 2.5,
    }
