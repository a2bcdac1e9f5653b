"""Where a run's numbers go beside metrics.jsonl, from rank 0: the trackers of `accelerate.tracking`, or a user's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from feddra_ds.common.environment import environment
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.logs import logger
from feddra_ds.common.plugins import find_class
from feddra_ds.config.schema import Config, RunConfig
from feddra_ds.federation.record import Record

# accelerate's own, by its names, which are those of the packages too: what its class is made with beside the project.
# {name} is the run's name, {dir} its folder. tests/unit/run/test_trackers.py compares the names with accelerate's.
TRACKERS: dict[str, dict[str, str]] = {
    "tensorboard": {"run_name": "events", "logging_dir": "{dir}"},
    "wandb": {"run_name": "{project}", "name": "{name}", "dir": "{dir}"},
    "mlflow": {"experiment_name": "{project}", "run_name": "{name}"},
    "trackio": {"run_name": "{project}", "name": "{name}"},
    "comet_ml": {"run_name": "{project}"},
    "aim": {"run_name": "{name}", "logging_dir": "{dir}", "experiment": "{project}"},
    "clearml": {"run_name": "{name}", "project_name": "{project}", "task_name": "{name}"},
    "dvclive": {"run_name": "{name}", "dir": "{dir}/dvclive"},
    "swanlab": {"run_name": "{project}", "experiment_name": "{name}", "logdir": "{dir}/swanlog"},
}


def tracker_problems(run: RunConfig) -> list[str]:
    """A line for each of run.trackers that cannot be had: an unknown name, a package or class that is not there.

    Of accelerate's own nothing is imported, so that this takes no time.
    """
    out = []
    for name in run.trackers:
        try:
            if name not in TRACKERS:
                _class_of(name)
            elif find_spec(name) is None:
                out.append(f"run.trackers: {name} needs the package {name}, which is not installed; pip install {name}")
        except ConfigError as error:
            out += error.problems
    return out


def _class_of(name: str) -> type[Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    own = {key: f"{kind.__module__}:{kind.__name__}" for key, kind in LOGGER_TYPE_TO_CLASS.items() if key in TRACKERS}
    return find_class("run.trackers", name, own, GeneralTracker)


class Trackers:
    """The trackers of one run. One that fails in the midst of it is left out from there on, with a warning."""

    def __init__(self) -> None:
        self._started: dict[str, Any] = {}

    def start(self, config: Config) -> None:
        """Start all of run.trackers and tell them the config. Raises ConfigError, with what the tracker says."""
        values = flat(config.model_dump(mode="json"))
        for name in config.run.trackers:
            tracker = _made(name, config.run)
            tracker.main_process_only = (
                False  # rank 0 alone is here; accelerate would ask for process groups of its own
            )
            try:
                tracker.start()
                self._started[name] = tracker
                tracker.store_init_configuration(dict(values))
            except Exception as error:  # whatever a tracker's package raises
                raise ConfigError([f"run.trackers: {name} does not start: {_first_line(error)}"]) from error

    def log(self, record: Record) -> None:
        """A round's numbers, at the round's number as the step."""
        for name, tracker in list(self._started.items()):
            try:
                tracker.log(numbers_of(record), step=record["round"])
            except Exception as error:
                del self._started[name]
                logger.warning(
                    "run.trackers: %s fails at round %d and is left out from here on (metrics.jsonl has all): %s",
                    name, record["round"], _first_line(error),
                )  # fmt: skip

    def close(self) -> None:
        """End what has started, whatever becomes of the run."""
        for name, tracker in self._started.items():
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("run.trackers: %s does not end well: %s", name, _first_line(error))
        self._started = {}


@contextmanager
def tracking(config: Config) -> Iterator[Trackers | None]:
    """The run's trackers while in it; None where it has none."""
    if not config.run.trackers:
        yield None
        return
    with _accelerate_alone():
        trackers = Trackers()
        try:
            trackers.start(config)
            yield trackers
        finally:
            trackers.close()


@contextmanager
def _accelerate_alone() -> Iterator[None]:
    """accelerate's state of the process, which its trackers log through: one process, no groups, no device of its own.

    It forms groups of its own, or takes a GPU, where it sees a launcher. A state that the caller has made is left as it is.
    """
    from accelerate.state import PartialState

    if PartialState._shared_state:
        yield
        return
    with environment({"LOCAL_RANK": None, "ACCELERATE_TORCH_DEVICE": "cpu"}):
        PartialState()
    try:
        yield
    finally:
        PartialState._reset_state()


def _made(name: str, run: RunConfig) -> Any:
    kind, run_dir = _class_of(name), Path(run.output_dir).absolute()
    if name not in TRACKERS:  # as accelerate makes a class of one's own
        return kind(run.project, str(run_dir)) if kind.requires_logging_directory else kind(run.project)
    known = {"project": run.project, "name": run.name or run_dir.name, "dir": str(run_dir)}
    return kind(**{key: value.format_map(known) for key, value in TRACKERS[name].items()})


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested dicts by dotted key, with values that every tracker takes: null and lists as JSON."""
    out: dict[str, bool | int | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = (
                value if isinstance(value, (bool, int, float, str)) else json.dumps(value, ensure_ascii=False)
            )
    return out


def numbers_of(record: Record) -> dict[str, float]:
    """A round's numbers by name, without those that are not known or not finite. No name has a sign that MLflow refuses."""
    out = {"loss/mean": record["mean_loss"], "loss/worst": record["worst_loss"]}
    for client, p, loss in zip(record["client_ids"], record["client_weights"], record["client_losses"], strict=True):
        out |= {f"weights/{client}": p, f"loss/{client}": loss}
    for name, values in record["val"].items():
        out |= {f"val/{name}/{key.replace('@', '_at_')}": value for key, value in values.items()}
    out |= {"bytes_sent_per_rank": record["bytes_sent_per_rank"], "seconds/round": record["seconds"]}
    out |= {f"seconds/{stage}": value for stage, value in record["stage_seconds"].items()}
    out["seconds/checkpoint_writer"] = record.get("checkpoint_writer_seconds")
    return {name: float(value) for name, value in out.items() if value is not None and math.isfinite(value)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
