"""A run directory as others read it: config, rounds, checkpoints, and whether anything still runs there. Files only."""

from __future__ import annotations

import difflib
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Required

import psutil
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from feddra_ds.common.errors import DataError
from feddra_ds.common.parse import OBJECT, check_fields, parse_json, parse_yaml
from feddra_ds.common.tree import get_path
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.run.evaluation_file import EVALUATION
from feddra_ds.run.metrics_file import read_metrics
from feddra_ds.run.progress import FILE_NAME as PROGRESS_NAME

EVALUATION_NAME = "evaluation.json"
TRANSFER_NAME = "finetune.json"
State = Literal["running", "finished", "stopped", "failed", "died", "silent", "starting", "unfinished"]
_SILENCE_S = 120.0  # a run on another host that says nothing for longer than this, and than three rounds, is silent


class _Schedule(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    rounds: int


class _Named(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: str


class _Clients(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    ids: list[str] | None


class _Dro(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    radius: float | None
    radius_share: float | None
    minimum_weight: float | None
    maximum_weight: float | None
    evaluation_batch_size: int | None


class _Config(TypedDict, total=False):
    """What others read of a run's config.yaml; an older run may have keys that are no longer."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    schedule: _Schedule
    strategy: _Named
    objective: _Named
    clients: _Clients
    dro: _Dro
    data: dict[str, Any]
    model: dict[str, Any]
    run: dict[str, Any]
    aggregate: dict[str, Any]
    evaluation: dict[str, Any]


class _Progress(TypedDict, total=False):
    """What others read of progress.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    state: Required[str]
    time: float
    reason: str | None
    host: str
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    process_began: float
    round: int
    phase: str | None
    client: str | None
    step: int | None
    num_steps: int | None
    loss: float | None
    seconds_left: float | None


_CONFIG, _PROGRESS = TypeAdapter(_Config), TypeAdapter(_Progress)


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says.

    config: config.yaml as nested dicts. lines: metrics.jsonl, a dict a round. progress: progress.json, or {}.
    evaluation, transfer: what `feddra-ds evaluate RUN` and `feddra-ds finetune RUN` last kept, or {}.
    """

    path: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    progress: dict[str, Any]
    evaluation: dict[str, Any]
    transfer: dict[str, Any]

    def get(self, key: str) -> Any:
        """The config's value at `section.key`, or None."""
        return get_path(self.config, key)

    @property
    def reading(self) -> DataConfig:
        """How the run's config wants its data read: whose shards, which texts, which val split."""
        data = self.get("data") or {}
        keys = ("root", "clients", "client_field", "text_field", "val_fraction", "order", "streaming")
        return DataConfig(**{key: data[key] for key in keys if key in data})

    @property
    def num_rounds(self) -> int:
        return int(self.get("schedule.rounds") or 0)

    @property
    def rounds_done(self) -> int:
        return int(self.lines[-1]["round"]) + 1 if self.lines else 0

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoints with a manifest, oldest first; their contents are not checked here."""
        return sorted(p for p in (self.path / "checkpoints").glob("round-*") if (p / "manifest.json").is_file())

    @property
    def models(self) -> dict[str, Path]:
        """Folders of final models by client; the key is "" for one model that all share. Empty before the run's end."""
        root = self.path / "model"
        if (root / "config.json").is_file():
            return {"": root}
        return {p.parent.name: p.parent for p in sorted(root.glob("*/config.json"))}

    @property
    def client_ids(self) -> list[str]:
        """Ids in the order of every list of metrics.jsonl; empty before the first round's end."""
        return list(self.lines[-1]["client_ids"]) if self.lines else []

    @property
    def last_sign(self) -> float:
        """Unix time of the newest thing that the run wrote."""
        files = [self.path / name for name in (PROGRESS_NAME, "metrics.jsonl", "config.yaml")]
        return max(file.stat().st_mtime for file in files if file.exists())

    def state(self, now: float | None = None) -> tuple[State, str]:
        """What the run is doing, and why that is believed."""
        age = (time.time() if now is None else now) - self.last_sign
        said = self.progress.get("state")
        complete = 0 < self.num_rounds <= self.rounds_done
        if said == "finished" or (said is None and complete and self.models):
            if complete:
                return "finished", "all rounds are done"
            return "unfinished", f"it finished earlier; config.yaml now asks for {self.num_rounds} rounds"
        if said == "stopped":
            return "stopped", str(self.progress.get("reason") or "stopped by a signal")
        if said == "failed":
            return "failed", str(self.progress.get("reason") or "no reason was written")
        if said == "running" and self.progress.get("host") == socket.gethostname():
            pid = int(self.progress.get("pid") or 0)
            if _is_process(pid, float(self.progress.get("process_began") or 0)):
                return "running", f"process {pid} on this machine is alive"
            return "died", f"process {pid} is gone and did not say why (killed, or out of memory?)"
        if said == "running":
            host = self.progress.get("host")
            if age <= max(_SILENCE_S, 3 * self.seconds_per_round()):
                return "running", f"on {host}, as its files say"
            return "silent", f"nothing was written for {age:.0f} s; look on {host}"
        if complete:
            return "unfinished", "all rounds are done, but model/ was not written"
        if not self.lines and age < 600:
            return "starting", "no round has ended yet"
        return "unfinished", f"{self.rounds_done} of {self.num_rounds} rounds are done and nothing says that it runs"

    def seconds_per_round(self) -> float:
        """Mean of the last three rounds; 0 where there is none."""
        recent = [float(line["seconds"]) for line in self.lines[-3:] if line.get("seconds") is not None]
        return sum(recent) / len(recent) if recent else 0.0

    def seconds_left(self, now: float | None = None) -> float | None:
        """What the run's process last estimated less the time since, else from the mean round; None if unknown."""
        now = time.time() if now is None else now
        estimate = self.progress.get("seconds_left")
        if self.progress.get("state") == "running" and estimate is not None:
            return max(0.0, float(estimate) - (now - float(self.progress.get("time", now))))
        return self.seconds_per_round() * max(0, self.num_rounds - self.rounds_done) if self.lines else None

    def resume_command(self) -> str:
        """What goes on with this run."""
        return f"feddra-ds train --config {self.path / 'config.yaml'} --run.output_dir {self.path}"


def training_pairs(files: RunFiles) -> dict[str, int]:
    """Training pairs by client, from the dataset where it is at hand."""
    try:
        dataset = open_dataset(files.get("data.root"), data=files.reading)
        counts = {
            client: dataset.num_samples(client, "train") for client in dataset.clients if dataset.has_index(client)
        }
    except (DataError, OSError):
        return {}
    if len(files.client_ids) == 1 and files.client_ids[0] not in counts:  # the centralised strategy
        wanted = files.get("clients.ids") or dataset.client_ids
        counts[files.client_ids[0]] = sum(counts.get(c, 0) for c in wanted)
    return counts


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run directory."""
    return (Path(path) / "config.yaml").is_file()


def open_run(path: str | Path) -> RunFiles:
    """Read a run directory. Raises ValueError, one line, where `path` is none."""
    root = Path(path).expanduser()
    if not root.is_dir():
        near: list[str] = []
        if root.parent.is_dir():
            near = difflib.get_close_matches(root.name, [p.name for p in root.parent.iterdir() if p.is_dir()], n=1)
        hint = f"; did you mean {root.parent / near[0]}?" if near else "; give a run's folder (run.output_dir)"
        raise ValueError(f"{root} is not a folder{hint}")
    if not is_run(root):
        runs = sorted(p.parent for p in root.glob("*/config.yaml"))
        hint = f"; did you mean {runs[0]}?" if runs else "; give a run's folder (run.output_dir)"
        raise ValueError(f"{root} holds no config.yaml, so it is not a run{hint}")
    try:
        config = parse_yaml((root / "config.yaml").read_bytes())
    except ValueError as error:
        raise ValueError(f"{root / 'config.yaml'} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{root / 'config.yaml'} holds no sections; is {root} a run?")
    try:
        check_fields(config, _CONFIG)
    except ValueError as error:
        raise ValueError(f"{root / 'config.yaml'}: {error}") from error
    lines = read_metrics(root / "metrics.jsonl")
    progress = _read(root / PROGRESS_NAME, _PROGRESS)
    evaluation, transfer = _read(root / EVALUATION_NAME, EVALUATION), _read(root / TRANSFER_NAME, OBJECT)
    return RunFiles(root, config, lines, progress, evaluation, transfer)


def _read(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any]:
    """{} where there is none of that kind: an older run has none, and a run can be read without it."""
    try:
        told = parse_json(path.read_bytes(), OBJECT)
        check_fields(told, kind)
        return told
    except (OSError, ValueError):
        return {}


def _is_process(pid: int, began: float) -> bool:
    """Whether this very process lives: a reused number has another birth."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - began) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False
