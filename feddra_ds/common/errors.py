"""What can go wrong in ways that a user can mend: each error names the key, file, client or rank, and what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """One or more problems of a config, each a line `key: what is wrong and what to do`."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class TooFewClients(RuntimeError):
    """Fewer than clients.minimum clients gave a valid update; the message says what happened to each of the others."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or of another model; the message names the file."""


class CheckpointNotWritten(RuntimeError):
    """A checkpoint that the run cannot do without could not be written; the message says by which rank and why."""


class WaitTimeout(RuntimeError):
    """A bounded wait ended; the message says for whom and how long."""


def mark_told(error: BaseException) -> None:
    """Note that the user has read what an error says, or reads another rank's instead: who catches it says no more."""
    error.__dict__["is_told"] = True


def is_told(error: BaseException) -> bool:
    """Whether `mark_told` has seen this error."""
    return bool(error.__dict__.get("is_told"))


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM: the run ends where it is; the last checkpoint is whole."""


class DataError(ValueError):
    """One or more problems of a dataset, each a line that names the config key, file or client."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
