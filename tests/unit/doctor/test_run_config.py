"""What `feddra-ds doctor --config` says of a config's round, and its --json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documented_json import check_documented
from run_helpers import make_config, make_data

from feddra_ds.cli import main
from feddra_ds.config.load import dump
from feddra_ds.doctor.run_config import check_config

TRAIN = {"evaluate_on": "train"}


@pytest.mark.parametrize(
    ("strategy", "dro", "expected"),
    [
        # 3 clients of 12 pairs, 3 steps of 4 pairs a round; west has no val split
        ({"name": "fedavg"}, {}, "a round shows every client 12 pairs, 1.5 × all of west's"),
        ({"name": "fedavg"}, TRAIN, "a round shows every client 12 pairs, 1.0 × all of north's"),
        ({"name": "centralized"}, TRAIN, "a round shows 36 pairs, 1.0 × all of them"),
        ({"name": "centralized", "budget": "client"}, TRAIN, "a round shows 12 pairs, 0.3 × all of them"),
    ],
)
def test_what_a_round_shows(tmp_path: Path, strategy: dict[str, str], dro: dict[str, str], expected: str) -> None:
    config = make_config(
        tmp_path / "run", make_data(tmp_path / "data"), strategy=strategy, dro=dro, evaluation={"every": 0}
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    told = {finding.what: finding.found for finding in check_config(str(path), {}, 1)}
    assert told["round"] == expected


def test_the_json_is_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(make_config(tmp_path / "run", tmp_path / "no data")))
    assert main(["doctor", "--no-self-test", "--json", "--config", str(path)]) == 1
    told = json.loads(capsys.readouterr().out)
    check_documented("doctor", told, but="^$")
    assert told["problems"] == sum(finding["level"] == "problem" for finding in told["findings"]) > 0
