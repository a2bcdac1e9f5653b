"""Progress: what a pipe, a terminal and progress.json are told, and the estimate of the time that is left."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from feddra_ds.common.logs import logger
from feddra_ds.common.text import duration
from feddra_ds.federation.protocol import ClientReport
from feddra_ds.federation.schedule import Stage
from feddra_ds.run.display import Display
from feddra_ds.run.progress import FILE_NAME, Progress, summary

CLIENTS = ["north", "south"]
STAGE1 = Stage("stage1", 2, 1e-3, trains_backbone=False, averages=True, hands_on_aligner=True, moves_mixture=False)
STAGE2 = Stage("stage2", 3, 1e-3, trains_backbone=True, averages=True, hands_on_aligner=False, moves_mixture=False)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(tmp_path: Path, **changes: Any) -> tuple[Progress, Clock]:
    clock = Clock()
    pieces: dict[str, Any] = {
        "strategy": "feddra",
        "clients": CLIENTS,
        "num_rounds": 4,
        "steps_per_round": 5,
        "batch_size": 8,
        "console": Console(file=io.StringIO()),
        "clock": clock,
    }
    return Progress(tmp_path, **(pieces | changes)), clock


def line(round_index: int, losses: list[float | None]) -> dict[str, Any]:
    known = [x for x in losses if x is not None]
    return {
        "round": round_index,
        "client_ids": CLIENTS,
        "client_weights": [0.5, 0.5],
        "next_client_weights": [0.25, 0.75],
        "client_losses": losses,
        "mean_loss": sum(known) / len(known) if known else None,
        "worst_loss": max(known, default=None),
        "val": {"all": {"i2t_recall@5": 0.4, "t2i_recall@5": 0.2, "chance@5": 0.1}},
    }


def train(
    progress: Progress,
    clock: Clock,
    stage: Stage,
    losses: dict[str, float],
    seconds: float = 1.0,
    others: dict[str, dict[str, Any]] | None = None,
    **more: Any,
) -> None:
    """A stage of this slot's clients; others: what was heard of other slots'."""
    progress.begin_stage(stage)
    for client, loss in losses.items():
        on_step = progress.begin_client(client)
        for step in range(stage.num_steps):
            clock.seconds += seconds
            on_step(step, loss)
    told = lambda loss: ClientReport(None, None, loss if math.isfinite(loss) else None, 8 * stage.num_steps)
    progress.end_stage(stage, {client: told(loss) for client, loss in losses.items()} | (others or {}), **more)


def test_a_pipe_gets_one_line_per_stage_and_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress, clock = make(tmp_path)
    with caplog.at_level(logging.INFO, "feddra_ds"), progress:
        logger.addHandler(caplog.handler)
        try:
            progress.begin_round(1)
            train(progress, clock, STAGE1, {"north": 5.0, "south": 6.0})
            progress.enter("evaluate")
            progress.end_round(line(1, [4.0, 4.5]))
        finally:
            logger.removeHandler(caplog.handler)
    told = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert told == [
        "round 1 (2/4) stage1: 2 clients × 2 steps, loss 5.5000, worst 6.0000 (south), 8 pairs/s, 4.0 s",
        "round 1 (2/4): loss 4.2500, worst 4.5000 (south), p 0.250 to 0.750 (south), recall@5 0.300 (chance 0.100), "
        "4.0 s; about 8.0 s left",
    ]
    assert progress.console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_the_stage_line_covers_the_clients_of_other_slots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress, clock = make(tmp_path, clients=["north"], num_slots=3)
    others = {"south": ClientReport(None, None, 7.0, 16), "west": ClientReport(None, None, None, 0)}
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "feddra_ds"), progress:
            train(progress, clock, STAGE1, {"north": 5.0}, others=others)
            train(progress, clock, STAGE2, {"north": 5.0}, slot_only=True)
    finally:
        logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records]
    assert "stage1: 3 clients × 2 steps, loss 6.0000, worst 7.0000 (south), 16 pairs/s, 2.0 s" in told[0]
    assert "stage2: north of this slot × 3 steps, loss 5.0000" in told[-1]


def test_a_stage_without_a_finite_loss_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress, clock = make(tmp_path, clients=["north"])
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "feddra_ds"), progress:
            train(progress, clock, STAGE1, {"north": float("nan")})
    finally:
        logger.removeHandler(caplog.handler)
    assert "north × 2 steps, no finite loss" in caplog.text


def test_the_estimate_follows_the_steps_then_the_rounds(tmp_path: Path) -> None:
    progress, clock = make(tmp_path)
    with progress:
        progress.begin_round(0)
        assert progress.seconds_left() is None
        progress.begin_stage(STAGE2)
        on_step = progress.begin_client("north")
        for step in range(2):
            clock.seconds += 1.0
            on_step(step, 1.0)
        # 2 of the round's 10 steps took 2 s: a round takes 10 s, 8 of them are left, and three rounds follow
        assert progress.seconds_left() == pytest.approx(8 + 3 * 10)
        assert progress.fraction_done() == pytest.approx(2 / 10 / 4)
        clock.seconds = 20.0
        progress.end_round(line(0, [1.0, 1.0]))
        assert progress.seconds_left() == pytest.approx(3 * 20)
        progress.begin_round(1)
        clock.seconds += 5
        assert progress.seconds_left() == pytest.approx(15 + 2 * 20)
        clock.seconds += 100  # slower than ever: what is left of the round is not negative
        assert progress.seconds_left() == pytest.approx(2 * 20)


def test_progress_json_says_where_and_how_it_ended(tmp_path: Path) -> None:
    progress, clock = make(tmp_path)
    read = lambda: json.loads((tmp_path / FILE_NAME).read_text())
    with progress:
        assert read()["state"] == "running"
        progress.begin_round(2)
        progress.begin_stage(STAGE2)
        on_step = progress.begin_client("north")
        on_step(0, 3.0)
        assert read()["client"] is None, "written at most every two seconds"
        clock.seconds += 3
        on_step(1, 3.5)
        told = read()
        assert (told["round"], told["phase"], told["client"], told["step"], told["num_steps"]) == (
            2,
            "stage2",
            "north",
            2,
            3,
        )
        assert (told["loss"], told["pid"], told["rounds"]) == (3.5, os.getpid(), 4)
        clock.seconds += 3
        on_step(2, float("nan"))
        assert read()["loss"] is None
    assert read()["state"] == "finished"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (SystemExit(143), "stopped", "stopped by a signal"),
        (KeyboardInterrupt(), "stopped", "stopped by a signal"),
        (ValueError("client north: shard gone\nmore"), "failed", "client north: shard gone"),
        (RuntimeError(), "failed", "RuntimeError"),
    ],
)
def test_an_end_before_the_end_has_its_reason(tmp_path: Path, error: BaseException, state: str, reason: str) -> None:
    progress, _ = make(tmp_path)
    with pytest.raises(type(error)), progress:
        raise error
    told = json.loads((tmp_path / FILE_NAME).read_text())
    assert (told["state"], told["reason"]) == (state, reason)


def test_other_ranks_say_and_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress, clock = make(tmp_path, enabled=False)
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "feddra_ds"), progress:
            progress.begin_round(0)
            train(progress, clock, STAGE1, {"north": 5.0})
            progress.end_round(line(0, [1.0, 2.0]))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_progress_cannot_be_written(tmp_path: Path) -> None:
    progress, clock = make(tmp_path / "gone")
    with progress:
        train(progress, clock, STAGE1, {"north": 5.0})
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("width", [36, 62, 100, 200])
def test_the_display_fits_any_width(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress, clock = make(tmp_path, console=console, clients=["a_client_with_a_very_long_name_" * 3])
    progress.begin_round(0)
    train(progress, clock, STAGE1, {progress.clients[0]: 4.0}, seconds=700)
    progress.end_round(line(0, [1.0, 2.0]) | {"client_ids": [progress.clients[0], "b"]})
    progress.begin_round(1)
    progress.begin_stage(STAGE2)
    progress.begin_client(progress.clients[0])(0, 4.2)
    console.print(progress.render())
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(shown) == 4, "round, step, run, last round: none wraps"
    assert max(map(len, shown)) <= width
    assert shown[0].startswith("feddra · round 1 (2/4) · stage2")
    assert "loss 4.2000" in shown[1]
    if width >= 100:
        assert shown[2].startswith("run 30%")
        assert "step 1/3" in shown[1]
        assert "left" in shown[2]


def test_phases_between_the_stages_have_names(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    progress, _ = make(tmp_path, console=console)
    progress.enter("stage1")  # a stage says more by begin_stage
    progress.enter("checkpoint")
    console.print(progress.render())
    assert "writing the checkpoint" in console.file.getvalue()  # type: ignore[attr-defined]


def test_log_lines_and_prints_do_not_tear_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    other = logging.getLogger("a.library")
    handler = logging.StreamHandler(screen)
    other.addHandler(handler)
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=60)
    display = Display(console, lambda: "DISPLAY")
    try:
        display.start()
        assert handler.stream is not screen
        other.warning("a library's line")
        print("a printed line")
    finally:
        display.stop()
        other.removeHandler(handler)
    assert handler.stream is screen
    assert sys.stdout is screen
    text = screen.getvalue()
    for said in ("a library's line", "a printed line"):
        assert f"{said}\n" in text.replace("\r", "")
        # what was written is followed by the display anew, so the line stands above it
        assert "DISPLAY" in text[text.index(said) :]


def test_what_goes_to_a_pipe_stays_out_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", pipe)
    display = Display(Console(file=screen, force_terminal=True, force_interactive=True, width=60), lambda: "DISPLAY")
    display.start()
    print("for the pipe")
    display.stop()
    assert pipe.getvalue() == "for the pipe\n"
    assert "for the pipe" not in screen.getvalue()


def test_no_display_without_a_terminal() -> None:
    pipe = io.StringIO()
    display = Display(Console(file=pipe), lambda: "DISPLAY")
    display.start()
    display.stop()
    assert pipe.getvalue() == ""


def test_summary_of_a_round_without_losses_and_of_one_client() -> None:
    assert summary(line(0, [None, None])) == "no client was evaluated"
    alone = {**line(0, [3.0, None]), "client_ids": ["pooled"], "client_losses": [3.0], "val": {}}
    assert summary(alone) == "loss 3.0000"


def test_summary_says_how_much_of_the_robust_gain_p_attains() -> None:
    gain: dict[str, Any] = {"mixture": 3.1, "mean": 3.0, "best": 3.4, "share": 0.25}
    assert ", 25 % of the robust gain" in summary({**line(0, [2.0, 4.0]), "robust_gain": gain})
    equal = {**gain, "share": None}
    assert "gain" not in summary({**line(0, [3.0, 3.0]), "robust_gain": equal})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (41.6, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (7200, "2 h"), (273_600, "3 d 4 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
