"""Who says what: a file for each rank, and on the terminal the reason of the first one that failed, once and last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from feddra_ds.common.errors import ConfigError, Interrupted, WaitTimeout, is_told
from feddra_ds.common.logs import log_to_stderr, logger
from feddra_ds.distributed.launch import Launch
from feddra_ds.run.rank_log import forget_failure, path_of, rank_log

LOST = "rank 0 waited 60 s for slot 1"


@pytest.fixture(autouse=True)
def _no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the test runner's, so that the log goes to stderr as in a process of its own."""
    monkeypatch.setattr(logger, "handlers", [])


def end(run_dir: Path, rank: int, error: BaseException | None, world_size: int = 3) -> BaseException | None:
    """A rank that logs a line of each level, writes below Python, and ends with an error or without."""
    try:
        with log_to_stderr(rank), rank_log(run_dir, Launch(rank, world_size, rank, "head", 1)):
            logger.info("all is well")
            logger.warning("almost")
            os.write(2, b"a stack of C++\n")
            os.write(1, b"of a library\n")
            if error is not None:
                raise error
    except BaseException as raised:
        return raised
    return None


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on the terminal, without their time."""
    seen = capfd.readouterr()
    return [line[9:] if line[2:3] == ":" else line for line in (seen.out + seen.err).splitlines()]


def test_below_python_all_goes_to_the_ranks_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert end(tmp_path, 0, None) is None
    assert said(capfd) == ["of a library", "all is well", "almost"]
    assert end(tmp_path, 1, None) is None
    assert said(capfd) == ["[rank 1] almost"]
    for rank, prints in ((0, False), (1, True)):
        text = path_of(tmp_path, rank).read_text()
        assert all(f"{line}\n" in text for line in ("INFO all is well", "WARNING almost", "a stack of C++"))
        assert ("of a library" in text) == prints
    os.write(2, b"back\n")
    assert said(capfd) == ["back"], "the terminal was not given back"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        # a rank fails, and the others because of it: its reason is the last line, and nobody adds another one
        ([(1, ValueError("no more")), (2, WaitTimeout(LOST)), (0, WaitTimeout(LOST))], ["[rank 1] rank 1", "rank 1"]),
        ([(1, ValueError("no more")), (2, Interrupted(143)), (0, Interrupted(143))], ["[rank 1] rank 1"]),
        ([(1, ValueError("no more")), (0, RuntimeError("gloo: Connection closed by peer"))], ["[rank 1] rank 1", "rank 1"]),
        # all for one reason
        ([(rank, ValueError("no more")) for rank in (2, 0, 1)], ["[rank 2] rank 2"]),
        # rank 0 has a reason of its own
        ([(1, ValueError("no more")), (0, OSError("disk full"))], ["[rank 1] rank 1", "rank 0"]),
    ],
)  # fmt: skip
def test_the_first_reason_is_said_last_and_alone(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    errors: list[tuple[int, BaseException]],
    expected: list[str],
) -> None:
    for rank, error in errors:
        raised = end(tmp_path, rank, error)
        assert raised is error
        assert is_told(error)
    lines = [line for line in said(capfd) if "almost" not in line and "well" not in line and "library" not in line]
    assert [line.partition(" on ")[0] for line in lines] == expected
    assert all("Traceback" not in line for line in lines)
    if expected[-1].endswith("1"):
        assert "failed: ValueError: no more (more: " in lines[-1]
        assert lines[-1].endswith(f"{path_of(tmp_path, 1)})")
    assert "ValueError: no more\n" in path_of(tmp_path, errors[0][0]).read_text()


def test_ctrl_c_is_said_once_with_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):
        assert isinstance(end(tmp_path, rank, Interrupted(130)), Interrupted)
    (line,) = [line for line in said(capfd) if "stopped" in line]
    assert line.endswith(f"or: feddra-ds train --config {tmp_path}/config.yaml")


def test_a_new_start_does_not_heed_the_failure_of_the_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    end(tmp_path, 1, ValueError("no more"))
    said(capfd)
    forget_failure(tmp_path)
    end(tmp_path, 0, WaitTimeout(LOST))
    assert said(capfd)[-1].startswith("rank 0 on ")


def test_a_single_process_keeps_its_streams(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = end(tmp_path, 0, ValueError("no more"), world_size=1)
    assert not is_told(error), "who catches it says it"  # type: ignore[arg-type]
    assert "a stack of C++" in said(capfd)
    assert "ValueError: no more" in path_of(tmp_path, 0).read_text()


def test_a_run_of_one_process_that_cannot_start_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), rank_log(tmp_path / "new", Launch(0, 1, 0, "head", 1)):
        raise ConfigError(["model.vision.pretrained: there is none"])
    assert not (tmp_path / "new").exists()
