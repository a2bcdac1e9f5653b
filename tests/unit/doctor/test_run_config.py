"""What `feddra-ds doctor --config` says of a config's round."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_helpers import make_config, make_data

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
