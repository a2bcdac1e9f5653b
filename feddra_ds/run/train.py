"""`feddra-ds train` and launch/train.py: a config in, an exit code out."""

from __future__ import annotations

import signal
import sys
from typing import Any

from feddra_ds.common.errors import ConfigError, Interrupted
from feddra_ds.common.logs import logger
from feddra_ds.config.load import load
from feddra_ds.config.schema import Config


def handle_signals() -> None:
    """Make SIGINT and SIGTERM end the run at once: no collective, no write; the next start resumes."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def run(path: str | None, overrides: dict[str, Any]) -> int:
    """Train from a YAML file with overrides on top. Exit code: 0; 2 bad config; 1 the run had to end; 128 + signal."""
    handle_signals()
    try:
        return train(load(path, overrides))
    except ConfigError as error:
        for problem in error.problems:
            print(f"feddra-ds: {problem}", file=sys.stderr)
        if path is None:
            print(
                "feddra-ds: --config: none was given, so each key has its default; `feddra-ds config list` shows examples",
                file=sys.stderr,
            )
        return 2


def train(config: Config) -> int:
    """Build and run all rounds. Returns the exit code; raises ConfigError."""
    from feddra_ds.common.errors import DataError, TooFewClients, WaitTimeout
    from feddra_ds.run.build import (
        build,  # late: a bad config is reported before torch, transformers and deepspeed are imported
    )

    try:
        run = build(config)
        run.rounds()
        run.topology.close()
    except Interrupted as stopped:
        logger.warning(
            "stopped by a signal; the same command goes on from the last checkpoint, or: feddra-ds train --config %s/config.yaml",
            config.run.output_dir,
        )
        return int(stopped.code or 1)
    except (TooFewClients, WaitTimeout, DataError) as error:
        logger.error("%s", error)
        return 1
    if run.coordinator is not None:
        logger.info("done. Next: feddra-ds report %s", run.run_dir)
    return 0
