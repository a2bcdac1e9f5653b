"""A JSON config of DeepSpeed's, as other trainers have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import load
from feddra_ds.config.overrides import parse_overrides

OURS = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
READ = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 1.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(OURS))
    return path


def test_a_file_on_the_command_line_lies_under_its_keys_in_any_order(file: Path) -> None:
    assert parse_overrides(["--deepspeed", str(file)]) == {"deepspeed": READ}
    words = [f"--deepspeed={file}", "--deepspeed.zero_optimization.stage=3"]
    for order in (words, words[::-1]):
        found = parse_overrides(order)
        assert found == {"deepspeed": {**READ, "zero_optimization": {**READ["zero_optimization"], "stage": 3}}}


def test_a_file_named_in_a_config(file: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"data: {{root: there}}\ndeepspeed: {file}\n")
    assert load(config, {"deepspeed": {"gradient_clipping": 0.5}}).deepspeed == {**READ, "gradient_clipping": 0.5}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be an object"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        parse_overrides(["--deepspeed", str(path)])
    (line,) = error.value.problems
    assert line.startswith("deepspeed: ")
    assert said in line
    assert str(path) in line


def test_what_the_trainer_fills_in_is_refused_where_it_has_a_value(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}))
    with pytest.raises(ConfigError) as error:
        load("quickstart", {"data": {"root": "there"}} | parse_overrides(["--deepspeed", str(path)]))
    assert [line.partition(":")[0] for line in error.value.problems] == [
        "deepspeed.optimizer",
        "deepspeed.train_batch_size",
    ]
