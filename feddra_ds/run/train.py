"""Training: `feddra_ds.train`, a config in and a result out, and `feddra-ds train`, which gives an exit code.

A call leaves the caller's process as it found it: no signal handler, no log handler, no process group, its random
generators where they were. torch, transformers and deepspeed are imported late, so that bad config or data is reported
first.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feddra_ds.common.environment import environment
from feddra_ds.common.errors import (
    CheckpointNotWritten,
    ConfigError,
    DataError,
    Interrupted,
    TooFewClients,
    WaitTimeout,
    is_told,
)
from feddra_ds.common.logs import log_to_stderr, logger
from feddra_ds.common.text import printable
from feddra_ds.common.tree import merge
from feddra_ds.config.load import from_dict, load
from feddra_ds.config.schema import Config
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.launcher_watch import end_with_launcher
from feddra_ds.run import stop_request
from feddra_ds.run.checks import Checked, check
from feddra_ds.run.lock import locked
from feddra_ds.run.rank_log import forget_failure, problems_told_once, rank_log

if TYPE_CHECKING:
    from feddra_ds.run.prediction import Predict

# What a run sets in the environment for DeepSpeed, tokenizers and the groups.
_VARIABLES = (
    "DS_ACCELERATOR", "LOCAL_RANK", "TOKENIZERS_PARALLELISM", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
)  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """What a training left on disk.

    run_dir: the run directory (run.output_dir). rounds: the lines of its metrics.jsonl, a dict a round from the first
    round on, those before a resume included; empty on a rank that cannot see the file, where the disk is not shared.
    model_dir: the final model, for `feddra_ds.load_pretrained`; with strategy.name=local, a folder per client in it.
    is_complete: whether all rounds are done; not where SIGUSR1 asked for an early end, and then there is no model yet.
    not_saved: why there is no checkpoint of that early end, where it could not be written (checkpoint.on_error=continue).
    """

    run_dir: Path
    rounds: list[dict[str, Any]]
    model_dir: Path
    is_complete: bool = True
    not_saved: str | None = None


def train(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any] | None = None) -> TrainResult:
    """Train all rounds that a config asks for, resumed where run.resume says so.

    config: the path of a YAML file, nested dicts of its sections, or a Config; `overrides`, nested dicts too, come on
    top. Under a launcher (`deepspeed script.py`) every rank calls it, with the same config, and every rank returns. It
    can be called again in the same process, after an error or Ctrl-C as well: the same call then goes on from the last
    checkpoint.

    Raises ConfigError (what is wrong in the config, all of it), DataError, TooFewClients (a round had fewer than
    clients.minimum), WaitTimeout (another rank was not heard in time), CheckpointError, CheckpointNotWritten (after the last
    round).
    """
    return _start(lambda: _config(config, overrides))


def _start(read: Callable[[], Config], *, from_terminal: bool = False, predict: Predict | None = None) -> TrainResult:
    """Train the config that `read` gives. from_terminal: whose output is this package's to arrange (rank_log)."""
    launch = Launch.from_environment()
    with ExitStack() as stack:
        stack.enter_context(log_to_stderr(launch.rank))
        stack.enter_context(environment({name: os.environ.get(name) for name in _VARIABLES}))
        os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # DeepSpeed asks for it, whatever the launcher
        with problems_told_once(launch):
            config = read()
            run_dir, is_dry = Path(config.run.output_dir), config.topology.dry_run
            found = check(config, launch)
            if launch.rank == 0 and not is_dry:
                stack.enter_context(locked(run_dir))
                forget_failure(run_dir)
        if from_terminal and not is_dry:
            stack.enter_context(rank_log(run_dir, launch))
        stack.enter_context(_generators_kept())
        stop = _train(config, found, predict)
        if from_terminal and launch.rank == 0 and stop is None and not is_dry:
            logger.info("done. Next: feddra-ds report %s", run_dir)
    from feddra_ds.run.metrics_file import read_metrics

    rounds = read_metrics(run_dir / "metrics.jsonl")
    return TrainResult(run_dir, rounds, run_dir / "model", stop is None, None if stop is None else stop.not_saved)


def run(path: str | None, overrides: dict[str, Any], predict: Predict | None = None) -> int:
    """Train from a YAML file with overrides on top. Exit code: 0; 2 bad config; 1 the run had to end; 128 + signal;
    75 where SIGUSR1 ended it after a checkpoint. predict: a rank's memory, for the plan of several ranks."""
    with _signals_end_the_run(), stop_request.heard_by_signal():
        code = _load_and_train(path, overrides, predict)
    if code == stop_request.EXIT_CODE:
        stop_request.keep_exit_code()
    return code


def _load_and_train(path: str | None, overrides: dict[str, Any], predict: Predict | None) -> int:
    try:
        launch = Launch.from_environment()
        with log_to_stderr(launch.rank):
            if launch.is_launched:
                end_with_launcher()
            return _exit_code(lambda: load(path, overrides), launch.rank, predict)
    except ConfigError as error:
        for problem in [] if is_told(error) else error.problems:
            print("feddra-ds:", printable(problem, keep="\n"), file=sys.stderr)
        if path is None and not is_told(error):
            print(
                "feddra-ds: --config: none was given, so each key has its default; `feddra-ds config list` shows examples",
                file=sys.stderr,
            )
        return 2


def _exit_code(read: Callable[[], Config], rank: int, predict: Predict | None) -> int:
    try:
        result = _start(read, from_terminal=True, predict=predict)
    except Interrupted as stopped:
        if not is_told(stopped) and rank == 0:
            logger.warning("stopped by a signal before the training began")
        return int(stopped.code or 1)
    except ConfigError:
        raise
    except (TooFewClients, WaitTimeout, DataError, CheckpointNotWritten) as error:
        if not is_told(error):
            logger.error("%s", error)
        return 1
    except Exception as error:
        if not is_told(error):
            raise
        return 1
    if not result.is_complete:
        if rank == 0:
            saved = "with a checkpoint" if result.not_saved is None else f"but {result.not_saved}"
            since = "" if result.not_saved is None else " from the one before"
            logger.warning(
                "stopped after round %d, %s, as SIGUSR1 asked; the same command goes on%s (exit code %d)",
                len(result.rounds) - 1, saved, since, stop_request.EXIT_CODE,
            )  # fmt: skip
        return stop_request.EXIT_CODE
    return 0


def _config(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any] | None) -> Config:
    """The checked config. Raises ConfigError."""
    if isinstance(config, (str, Path)):
        return load(config, dict(overrides or {}))
    tree = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
    return from_dict(merge(tree, dict(overrides or {})))


@dataclass(frozen=True)
class _Stop:
    """An early end that SIGUSR1 asked for. not_saved: as in TrainResult."""

    not_saved: str | None


def _train(config: Config, found: Checked, predict: Predict | None) -> _Stop | None:
    """All rounds, and then, however they ended, this process is free of the run. None where all are done."""
    from feddra_ds.engine.bootstrap import leave_groups

    try:
        stop = _rounds(config, found, predict)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # a notebook keeps it, and with it the engine and the run's port
        leave_groups(failed=True)
        raise
    leave_groups()
    return stop


def _rounds(config: Config, found: Checked, predict: Predict | None) -> _Stop | None:
    if config.topology.dry_run:
        from feddra_ds.run.dry_run import dry_run

        dry_run(config, found, predict)
        return None
    from feddra_ds.run.build import build
    from feddra_ds.run.trackers import tracking

    is_coordinator = Launch.from_environment().rank == 0
    with tracking(config) if is_coordinator else nullcontext() as trackers:  # who cannot start says so before the build
        run = build(config, found, predict)
        run.trackers = trackers
        run.rounds()
    run.engine.close()
    run.topology.close()
    return _Stop(run.not_saved) if run.stops else None


@contextmanager
def _signals_end_the_run() -> Iterator[None]:
    """While in it, SIGINT, SIGTERM and SIGHUP raise Interrupted: no collective, no write; the next start resumes.

    Under nohup, which ignores SIGHUP, it stays ignored.
    """

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(128 + number)

    heard = [signal.SIGINT, signal.SIGTERM]
    heard += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put back the global random generators of python, numpy and torch, which a run seeds."""
    import numpy as np
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
