"""Several runs on one page: their figures, what differs in their configs, and what evaluate and finetune kept of each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_helpers import make_config, make_line, make_run, robust_columns
from test_report import check_self_contained

from feddra_ds.cli import main
from feddra_ds.report.side_by_side import differences
from feddra_ds.run.files import TRANSFER_NAME, open_run


def make(folder: Path, strategy: str, lines: list[dict[str, Any]], **sections: Any) -> Path:
    config = make_config(folder, folder.parent / "data", strategy={"name": strategy}, **sections)
    return make_run(folder, config, lines)


def interval(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125, "values": [mean]}


def transfer_of(mean: float) -> dict[str, Any]:
    cell = {name: interval(mean) for name in ("auroc", "accuracy", "balanced_accuracy")}
    about = {"mean": cell, "by_label": {"odd": cell}, "by_client": {"north": cell}}
    return {
        "round": 2, "split": "test", "val_split": "val", "data": "there", "fractions": [0.1], "modes": ["linear"],
        "seeds": [0], "held_out": [], "labels": {"odd": {}}, "labels_left_out": {}, "non_finite": {},
        "transfer": {"linear": {"0.1": about}},
    }  # fmt: skip


def page_of(tmp_path: Path, *runs: Path) -> Any:
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    return check_self_contained(out.read_text(encoding="utf-8"))


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    excluded = [{"id": "west", "reason": "late"}]
    lines = [make_line(r, **robust_columns(r), excluded_clients=excluded) for r in range(3)]
    first = make(tmp_path / "one", "feddra", lines, optimizer={"lr": 0.25})
    other = make(tmp_path / "two", "fedavg", [make_line(0)], optimizer={"lr": 0.5})
    (first / TRANSFER_NAME).write_text(json.dumps(transfer_of(0.75)))
    page = page_of(tmp_path, first, other)
    for expected in (
        "2 runs side by side",
        "run one two strategy feddra fedavg state unfinished unfinished rounds 3 of 3 1 of 3",
        "mean loss 2.200 2.600 worst loss 2.700 2.700 spread 0.800 0.200 recall@5 (chance) 40 % (31 %) 40 % (31 %)",
        "robust gain 40 % – left out west × 3 nobody sent a rank, a round 1.2 MB 1.2 MB",
        "peak memory 500.0 MB 500.0 MB time 18 s 6.0 s",
        "strategy.name feddra fedavg",
        "optimizer.lr 0.25 0.5",
        "linear 10 % 0.750 (0.625 to 0.875) –",
    ):
        assert expected in page.text, (expected, page.text)
    assert "output_dir" not in page.text, "which differs between any two runs"
    names = [value for _, name, value in page.attributes if name == "aria-label"]
    assert {"Mean loss over rounds", "Share of the robust gain over rounds"} <= set(names)


def test_what_evaluate_kept_stands_side_by_side(tmp_path: Path) -> None:
    told = []
    for number in range(2):
        run = make(tmp_path / f"run{number}", "feddra", [make_line(r) for r in range(3)])
        e = {
            "k": 5,
            "recall": 0.5 + number / 4,
            "low": 0.25,
            "high": 0.875,
            "chance": 0.0625,
            "verdict": "above chance",
        }
        gallery = {"pairs": 8, "intervals": {"recall@5": e}}
        told.append({
            "round": 1 + number, "split": "val", "data": "there", "clients": {"north": gallery | {"held_out": False}},
            "pooled": None, "without_split": [], "worst_mixture": None, "zero_shot": {},
            "non_finite": {"weights": {"a.weight": 2}, "pairs": {}} if number else {},
        })  # fmt: skip
        (run / "evaluation.json").write_text(json.dumps(told[-1]))
    out = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "run0"), str(tmp_path / "run1"), "--out", str(out)]) == 1
    text = check_self_contained(out.read_text()).text
    assert "north 50 % (25 to 88) chance 6.2 75 % (25 to 88) chance 6.2" in text
    assert "run0 after round 1, val of there ( 1 round ended since ); run1 after round 2, val of there" in text
    assert "run1: the model has 2 weights that are not finite: a.weight (2)" in text


def test_keys_that_only_one_has_differ(tmp_path: Path) -> None:
    runs = {name: open_run(make(tmp_path / name, "feddra", [])) for name in ("a", "b")}
    assert differences(runs) == []
    del runs["b"].config["dro"]["radius"]
    runs["b"].config["clients"]["ids"] = ["x", "y"]
    assert differences(runs) == [("clients.ids", ["null", "[x, y]"]), ("dro.radius", ["1.0", "–"])]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a", "a"], "RUN: .*a is given twice"),
        (list("abcdefgh"), "RUN: 8 runs are more than the 7 that can be told apart on one page"),
        (["a", "b", "--data", "x"], "--data: is of the examples, without which several runs are shown; leave it out"),
    ],
)
def test_what_cannot_be_side_by_side_is_said(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in {word for word in words if len(word) == 1 and word != "x"}:
        make(tmp_path / name, "feddra", [])
    assert main(["report", *words]) == 2
    assert re.search(line, capsys.readouterr().err)
    assert not (tmp_path / "runs.html").exists()
