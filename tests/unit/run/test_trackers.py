"""The trackers: accelerate's by name, one's own by class; real event files, and what is wrong said in one line."""

from __future__ import annotations

import inspect
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from run_helpers import CLIENTS, make_config, make_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.run.trackers import TRACKERS, flat, numbers_of, tracker_problems, tracking


class Diary(GeneralTracker):
    """A user's own, which keeps what it is told."""

    name = "diary"
    requires_logging_directory = False
    told: list[tuple[str, Any]] = []  # noqa: RUF012
    fails_in = ""

    def __init__(self, project: str):
        super().__init__()
        self.tell("project", project)

    def tell(self, what: str, value: Any) -> None:
        if what == self.fails_in:
            raise OSError(f"no ink for {what}\nand no paper")
        self.told.append((what, value))

    @property
    def tracker(self) -> None:
        return None

    @on_main_process
    def start(self) -> None:
        self.tell("start", None)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.tell("config", values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.tell("log", (step, values))

    @on_main_process
    def finish(self) -> None:
        self.tell("finish", None)


@pytest.fixture(autouse=True)
def diary(monkeypatch: pytest.MonkeyPatch) -> type[Diary]:
    module = ModuleType("of_the_hospital")
    module.Diary, module.Other = Diary, Path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_the_hospital", module)
    monkeypatch.setattr(Diary, "told", [])
    monkeypatch.setenv("LOCAL_RANK", "3")  # as under a launcher
    return Diary


def config_of(tmp_path: Path, *trackers: str, **run: str) -> Config:
    where = {"output_dir": str(tmp_path / "night"), "device": "cpu", "trackers": list(trackers)}
    return from_dict(make_config(tmp_path / "night", tmp_path).model_dump() | {"run": where | run})


def test_the_names_are_those_of_accelerate_and_its_classes_take_what_they_are_given() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    for name, arguments in TRACKERS.items():
        inspect.signature(LOGGER_TYPE_TO_CLASS[name]).bind(**arguments)


def test_tensorboard_has_each_round_and_the_config(tmp_path: Path) -> None:
    config = config_of(tmp_path, "tensorboard")
    with tracking(config) as trackers:
        assert trackers is not None
        for number in (0, 1):
            trackers.log(make_line(number))
    events = EventAccumulator(str(tmp_path / "night" / "events")).Reload()
    tags = events.Tags()["scalars"]
    worst = events.Scalars("loss/worst")
    assert [(event.step, round(event.value, 4)) for event in worst] == [(0, 2.7), (1, 2.7)]
    assert [round(event.value, 4) for event in events.Scalars(f"weights/{CLIENTS[0]}")] == [0.3333, 0.3167]
    assert {"val/all/i2t_recall_at_5", "seconds/round", "seconds/stage2", "bytes_sent_per_rank"} <= set(tags)
    assert "dro.evaluation_pairs: 8" in next((tmp_path / "night" / "events").rglob("hparams.yml")).read_text()


def test_a_tracker_of_ones_own_hears_project_config_rounds_and_end(tmp_path: Path, diary: type[Diary]) -> None:
    config = config_of(tmp_path, "of_the_hospital:Diary", project="chest", name="first night")
    assert tracker_problems(config.run) == []
    line = make_line(4, client_losses=[1.0, None, float("nan")], mean_loss=None)
    with suppress(KeyboardInterrupt), tracking(config) as trackers:
        assert trackers is not None
        trackers.log(line)
        raise KeyboardInterrupt
    assert [what for what, _ in diary.told] == ["project", "start", "config", "log", "finish"]
    heard = dict(diary.told)
    assert heard["project"] == "chest"
    assert (heard["config"]["run.name"], heard["config"]["clients.ids"]) == ("first night", "null")
    step, values = heard["log"]
    assert step == 4
    assert f"loss/{CLIENTS[0]}" in values
    assert not {"loss/mean", f"loss/{CLIENTS[1]}", f"loss/{CLIENTS[2]}"} & set(values), "an unknown number was told"
    assert PartialState._shared_state == {}, "accelerate's state outlives the run"
    assert os.environ["LOCAL_RANK"] == "3"


def test_one_that_fails_in_a_round_is_left_out_and_the_others_go_on(
    tmp_path: Path, diary: type[Diary], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(diary, "fails_in", "log")
    monkeypatch.setattr("feddra_ds.common.logs.logger.propagate", True)
    with tracking(config_of(tmp_path, "of_the_hospital:Diary", "tensorboard")) as trackers:
        assert trackers is not None
        for number in (0, 1):
            trackers.log(make_line(number))
    told = [record.getMessage() for record in caplog.records if "run.trackers" in record.getMessage()]
    assert len(told) == 1
    assert "of_the_hospital:Diary fails at round 0" in told[0]
    assert told[0].endswith("OSError: no ink for log")
    assert len(EventAccumulator(str(tmp_path / "night" / "events")).Reload().Scalars("loss/mean")) == 2


def test_one_that_does_not_start_ends_the_run_before_it_is_built(
    tmp_path: Path, diary: type[Diary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary, "fails_in", "config")
    with (
        pytest.raises(
            ConfigError, match=r"run.trackers: of_the_hospital:Diary does not start: OSError: no ink for config$"
        ),
        tracking(config_of(tmp_path, "of_the_hospital:Diary")),
    ):
        pass
    assert [what for what, _ in diary.told][-1] == "finish"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tensorbord", "run.trackers: did you mean tensorboard?"),
        ("of_the_hospital:Dairy", "run.trackers: of_the_hospital:Dairy: of_the_hospital has no class 'Dairy'"),
        ("of_the_hospital:Other", "run.trackers: of_the_hospital:Other must be a subclass of accelerate.tracking"),
        ("aim", "run.trackers: aim needs the package aim, which is not installed; pip install aim"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    tmp_path: Path, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feddra_ds.run.trackers.find_spec", lambda name: None)
    (problem,) = tracker_problems(config_of(tmp_path, name).run)
    assert problem.startswith(expected)


def test_a_line_and_a_config_become_flat_values_that_all_trackers_take(tmp_path: Path) -> None:
    values = flat(from_dict({"data": {"root": str(tmp_path)}}).model_dump(mode="json"))
    assert values["optimizer.betas"] == "[0.9, 0.999]"
    assert values["deepspeed"] == "{}"
    assert {type(value) for value in values.values()} <= {bool, int, float, str}
    assert not [name for name in numbers_of(make_line(0)) if "@" in name], "MLflow refuses this sign"
