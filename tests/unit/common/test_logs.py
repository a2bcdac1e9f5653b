"""metrics.jsonl: a resumed run repeats no round and loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feddra_ds.common.text import by_reason, listed
from feddra_ds.run.metrics_file import MetricsFile, read_metrics


def record(number: int, **more: Any) -> Any:
    told = {"client_ids": [], "client_weights": [], "client_losses": [], "excluded_clients": []}
    return {"round": number, "mean_loss": None, "worst_loss": None, **told, **more}


def test_resume_drops_the_rounds_that_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for number in range(4):
        first.append(record(number))
    MetricsFile(path, 2).append(record(2, again=True))
    assert read_metrics(path) == [record(0), record(1), record(2, again=True)]


def test_a_line_that_a_kill_kept_from_the_file_comes_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).append(record(0))
    with open(path, "a") as file:
        file.write('{"round": 1, "cli')  # cut off mid-write
    MetricsFile(path, 2, last=record(1, x=1))
    assert read_metrics(path) == [record(0), record(1, x=1)]
    MetricsFile(path, 2, last=record(1, x=2))  # already there: not written twice
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record(0), record(1, x=1)]


def test_a_line_in_the_middle_that_is_no_round_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": "x"}\n' + json.dumps(record(1)) + "\n")
    with pytest.raises(ValueError, match="line 1 is no round of a run: round: must be a valid integer"):
        read_metrics(path)


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_listed_names_a_few_and_counts_the_rest() -> None:
    names = [f"c{i}" for i in range(8)]
    assert listed(names) == "c0, c1, c2, c3, c4 and 3 more"
    assert listed(names[:5]) == "c0, c1, c2, c3, c4"
    assert listed(names, 1) == "c0 and 7 more"


def test_exclusions_are_grouped_by_their_reason() -> None:
    lost = [{"id": client, "reason": "slot 1 is gone"} for client in ("a", "c")]
    assert by_reason([*lost, {"id": "b", "reason": "bad"}]) == {"slot 1 is gone": ["a", "c"], "bad": ["b"]}
