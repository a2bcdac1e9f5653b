"""Which checkpoint a run goes on from, and whether its config may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feddra_ds.checkpoint.format import EMA, WEIGHTS, check, folder_of, read_coordinator
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.logs import logger
from feddra_ds.common.section import may_change, may_change_partly
from feddra_ds.common.tree import flat
from feddra_ds.config.load import known_keys
from feddra_ds.config.schema import Config
from feddra_ds.distributed.topology import Topology


def agree_on_checkpoint(config: Config, topology: Topology) -> Path | None:
    """The checkpoint that all ranks resume from, chosen by the coordinator, or None. Raises ConfigError on every rank."""
    message: dict[str, Any] = {}
    if topology.is_coordinator:
        try:
            folder = choose_checkpoint(config)
            message = {"folder": None if folder is None else str(folder), "problems": []}
        except ConfigError as error:
            message = {"folder": None, "problems": error.problems}
        topology.post("resume", message)
    message = topology.fetch("resume", sender="the coordinator (rank 0)")
    if message["problems"]:
        raise ConfigError(message["problems"])
    if topology.is_coordinator and message["folder"]:
        logger.info("resuming from %s", message["folder"])
    return Path(message["folder"]) if message["folder"] else None


def choose_checkpoint(config: Config) -> Path | None:
    """run.resume: the newest whole checkpoint (auto), none (never), or the one named. Raises ConfigError."""
    run_dir, wanted = Path(config.run.output_dir), config.run.resume
    if wanted == "never":
        if any((run_dir / "checkpoints").glob("round-*")):
            raise ConfigError(
                [f"run.resume: never, but {run_dir} holds checkpoints; choose another run.output_dir, or auto"]
            )
        return None
    if wanted == "auto":
        folder = find_newest(run_dir)
    else:
        folder = Path(wanted)
        problem = check(folder)
        if problem is not None:
            raise ConfigError([f"run.resume: {wanted} is not a whole checkpoint: {problem}"])
    if folder is not None:
        saved = read_coordinator(folder)["config"]
        conflicts = differences(saved, config.model_dump(mode="json"), type(config))
        if conflicts:
            raise ConfigError([f"{line}; keep it, or start anew in another run.output_dir" for line in conflicts])
    return folder


def differences(saved: dict[str, Any], now: dict[str, Any], config: type[Config]) -> list[str]:
    """A line per key whose value in a checkpoint's config differs and matters, the key first.

    What a key says of itself decides (MAY_CHANGE); a key that the config of now does not know matters, and so do the
    rounds that a learning rate decays over.
    """
    keys = known_keys(config)
    lines = []
    for key, a, b in _leaves(saved, now, set(keys)):
        info = keys.get(key)
        if a == b:
            continue
        if info is not None and may_change_partly(info):
            before, after = flat(a or {}), flat(b or {})
            for path in sorted(before.keys() | after.keys()):
                x, y = before.get(path), after.get(path)
                if x != y and (x or y) and not may_change(info, path):  # null, false and 0 are as if left out
                    lines.append(_changed(f"{key}.{path}", x, y))
        elif key == "schedule.rounds" and now["schedule"]["decay"] != "constant":
            lines.append(
                f"{_changed(key, a, b)}, over which schedule.decay={now['schedule']['decay']} takes the learning rate"
            )
        elif info is None or not may_change(info):
            lines.append(_changed(key, a, b))
    return lines


def _changed(key: str, before: Any, now: Any) -> str:
    return f"{key}: is {now!r}, but the checkpoint was trained with {before!r}"


def _leaves(a: Any, b: Any, keys: set[str], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The values of two trees side by side, down to known keys (whose value may be a dict) or to what is no dict."""
    if path in keys or not (isinstance(a, dict) and isinstance(b, dict)):
        yield path, a, b
        return
    for name in sorted(a.keys() | b.keys()):
        yield from _leaves(a.get(name), b.get(name), keys, f"{path}.{name}" if path else name)


def find_checkpoint(run: Path, name: str | None) -> Path:
    """A run's checkpoint by path, folder name or round number; the newest whole one where `name` is None.

    Raises ValueError.
    """
    if name is None:
        newest = find_newest(run)
        if newest is None:
            raise ValueError(f"{run} has neither a model/ nor a whole checkpoint")
        return newest
    candidates = [Path(name), run / "checkpoints" / name]
    if name.isdigit():
        candidates.append(folder_of(run, int(name)))
    for folder in candidates:
        if (folder / "manifest.json").is_file():
            return folder
    there = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("round-*"))) or "none"
    raise ValueError(f"--checkpoint {name}: no such checkpoint of {run}; it has {there}")


def averaged_checkpoint(run: Path, name: str | None = None) -> Path:
    """A run's checkpoint, as find_checkpoint gives it, that holds the average over rounds. Raises ValueError."""
    if name is None and find_newest(run) is None:
        raise ValueError(f"--ema: {run} has no whole checkpoint, and the average over rounds is in no other place")
    folder = find_checkpoint(run, name)
    if not (folder / WEIGHTS / EMA).is_dir():
        raise ValueError(f"--ema: {folder} holds no average over rounds; train with aggregate.ema, such as 0.9")
    return folder


def find_newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; broken ones are passed over with a warning."""
    for folder in sorted((run_dir / "checkpoints").glob("round-*"), reverse=True):
        problem = check(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, problem)
    return None
