"""`feddra-ds status` and what it reads: every state a run's files can be in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from documented_json import check_documented
from run_helpers import make_config, make_line, make_run, robust_columns

from feddra_ds.cli import main
from feddra_ds.report.standing import standing
from feddra_ds.run.files import open_run


def running(**changes: Any) -> dict[str, Any]:
    return {
        "state": "running",
        "reason": None,
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": psutil.Process().create_time(),
        "round": 1,
        "rounds": 3,
        "phase": "stage2",
        "client": "north",
        "client_number": 1,
        "num_clients": 3,
        "step": 7,
        "num_steps": 20,
        "loss": 2.125,
        "seconds_left": 90.0,
    } | changes


@pytest.fixture
def run_with(tmp_path: Path) -> Any:
    def make(num_lines: int, progress: dict[str, Any] | None, rounds: int = 3) -> Path:
        config = make_config(tmp_path / "run", tmp_path / "data", rounds)
        return make_run(tmp_path / "run", config, [make_line(r) for r in range(num_lines)], progress)

    return make


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def test_a_running_run(run_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(1, running())
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"feddra, running (process {os.getpid()} on this machine is alive)" in text
    assert "1 of 3 done; now round 1, stage2, north, step 7/20, loss 2.1250" in text
    assert "6.0 s a round; about 1 min 30 s left" in text
    assert "last checkpoint: none yet" in text
    rows = [line.split("│") for line in text.splitlines() if line.startswith(("west", "north"))]
    assert [cell.strip() for cell in rows[0]] == ["north", "0.333", "0.317", "2.5000", "2.5000", "0.500", "0.625"]
    assert [cell.strip() for cell in rows[1]] == ["west", "0.333", "0.367", "2.7000", "2.7000", "–", "–"]
    (mean,), (pooled,) = (
        [line.split("│") for line in text.splitlines() if line.startswith(name)]
        for name in ("mean", "all, one gallery")
    )
    assert [cell.strip() for cell in mean] == ["mean", "", "", "2.6000", "2.6000", "0.500", "0.625"]
    assert [cell.strip() for cell in pooled] == ["all, one gallery", "", "", "", "", "0.400", "0.312"]
    assert f"Next:\n  feddra-ds status {run} --watch 5" in text


def test_losses_with_their_errors_and_the_robust_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [make_line(0), make_line(1, **robust_columns(1))]
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", tmp_path / "data"), lines, running())
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert "skipped: 2 local steps, whose gradients were not finite" in text
    assert "not believed in the last round: west, loss 1e+30, taken as 2.773" in text
    rows = {
        line.split("│")[0].strip(): [c.strip() for c in line.split("│")] for line in text.splitlines() if "│" in line
    }
    assert "train loss" in text
    assert rows["west"][3:6] == ["2.7000", "2.7000 ± 0.0700", "1.7000"]
    assert rows["mean"][3:6] == ["2.6000", "2.4000", "1.6000"]
    assert len(rows["all, one gallery"]) == len(rows["west"]) == 8
    assert "p attains 40 % of the robust gain." in text
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    trouble = {"id": "west", "reason": "its update was not finite"}
    line = make_line(1, **robust_columns(1), excluded_clients=[trouble])
    told_too = make_run(tmp_path / "run", make_config(tmp_path / "run", tmp_path / "data"), [line], running())
    (tmp_path / "run" / "checkpoints" / "round-0").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "round-0" / "manifest.json").write_text("{}")
    assert main(["status", str(told_too), "--json"]) == 0
    check_documented("status", json.loads(capsys.readouterr().out), but="@10")
    assert told["robust_gain"]["share"] == 0.4
    assert (told["client_losses_se"], told["skipped_steps"]) == ([0.05, 0.060000000000000005, 0.07], 2)


def test_the_estimate_shrinks_with_the_time_since_it_was_made(run_with: Any) -> None:
    told = standing(open_run(run_with(1, running(time=time.time() - 30))))
    assert told["seconds_left"] == pytest.approx(60, abs=2)
    assert standing(open_run(run_with(1, running(time=time.time() - 300))))["seconds_left"] == 0


@pytest.mark.parametrize(
    ("lines", "progress", "state", "reason"),
    [
        (3, {"state": "finished"}, "finished", "all rounds are done"),
        (2, {"state": "finished"}, "unfinished", "config.yaml now asks for 3 rounds"),
        (1, {"state": "stopped", "reason": "stopped by a signal"}, "stopped", "stopped by a signal"),
        (1, {"state": "failed", "reason": "client north: bad"}, "failed", "client north: bad"),
        (1, {"host": "elsewhere"}, "running", "on elsewhere, as its files say"),
        (1, {"process_began": 1.0}, "died", "is gone and did not say why"),
        (0, None, "starting", "no round has ended yet"),
        (1, None, "unfinished", "1 of 3 rounds are done and nothing says that it runs"),
        (3, None, "unfinished", "all rounds are done, but model/ was not written"),
    ],
)
def test_states(run_with: Any, lines: int, progress: dict[str, Any] | None, state: str, reason: str) -> None:
    files = open_run(run_with(lines, None if progress is None else running(**progress)))
    assert files.state()[0] == state
    assert reason in files.state()[1]


def test_a_killed_run_and_a_silent_one(run_with: Any) -> None:
    assert open_run(run_with(1, running(pid=dead_process()))).state()[0] == "died"
    files = open_run(run_with(1, running(host="elsewhere")))
    assert files.state(now=time.time() + 119)[0] == "running"
    assert files.state(now=time.time() + 121) == ("silent", "nothing was written for 121 s; look on elsewhere")
    assert open_run(run_with(0, None)).state(now=time.time() + 700)[0] == "unfinished"


def test_an_old_finished_run_without_progress(run_with: Any) -> None:
    run = run_with(3, None)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert open_run(run).state()[0] == "finished"


def test_a_dead_run_exits_1_and_says_how_to_go_on(run_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(1, running(pid=dead_process()))
    assert main(["status", str(run)]) == 1
    text = capsys.readouterr().out
    assert f"feddra-ds train --config {run}/config.yaml --run.output_dir {run}   # starts anew" in text
    checkpoint = run / "checkpoints" / "round-000000"
    checkpoint.mkdir(parents=True)
    assert open_run(run).checkpoints == [], "without a manifest it is none"
    (checkpoint / "manifest.json").write_text("{}")
    main(["status", str(run)])
    text = capsys.readouterr().out
    assert f"last checkpoint: {checkpoint}" in text
    assert "# goes on from the last checkpoint" in text


def test_trouble_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {"north": {"corrupt_image": 2}, "south_and_the_islands": {"empty_text": 1}, "west": {}}
    reason = "5 steps in a row had a non-finite loss"
    losses = [2.0, None, 2.5]
    bad = make_line(
        0, skipped_samples=skipped, excluded_clients=[{"id": "west", "reason": reason}], client_losses=losses
    )
    run = make_run(tmp_path / "run", make_config(tmp_path / "run", tmp_path / "data"), [bad])
    assert main(["status", str(run)]) == 1
    text = capsys.readouterr().out
    assert "skipped: 3 samples could not be read" in text
    assert f"excluded in the last round: west: {reason}" in text


def test_json_and_half_a_line(run_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(2, running())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "client_i')
    (run / "progress.json").write_text("{")
    assert main(["status", str(run), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["rounds_done"], told["rounds"], told["state"], told["now"]) == (2, 3, "unfinished", None)
    assert told["client_weights"] == make_line(1)["next_client_weights"]


def test_watching_ends_with_the_run(run_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(2, running())
    path = str(run / "progress.json")
    finish = f'import time, pathlib; time.sleep(0.6); pathlib.Path({path!r}).write_text(\'{{"state": "failed"}}\')'
    process = subprocess.Popen([sys.executable, "-c", finish])
    assert main(["status", str(run), "--watch", "0.1"]) == 1
    process.wait(30)
    text = capsys.readouterr().out
    assert text.count("feddra, running") > 1
    assert "feddra, failed" in text


def test_wrong_paths_have_one_line(tmp_path: Path, run_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(1, None)
    cases = {
        tmp_path / "rum": f"{tmp_path}/rum is not a folder; did you mean {run}?",
        tmp_path: f"{tmp_path} holds no config.yaml, so it is not a run; did you mean {run}?",
        tmp_path / "xyzzy" / "deep": "is not a folder; give a run's folder (run.output_dir)",
    }
    for path, message in cases.items():
        assert main(["status", str(path)]) == 2
        told = capsys.readouterr()
        assert message in told.err
        assert told.err.count("\n") == 1
    assert main(["status", str(run), "--watch", "0"]) == 2
    assert "--watch: must be more than 0 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("just words", "holds no sections")])
def test_a_broken_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path)


def test_an_empty_folder_offers_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a run's folder"):
        open_run(tmp_path)
