"""evaluate, probe, report, status and doctor as a user runs them, on a run that was trained by the same command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_helpers import encoded
from helpers import tree, weights_of, write_dataset
from run_helpers import CLIENTS, HELD_OUT, add_model, make_config, make_data, make_line, make_run

from feddra_ds.cli import main
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.doctor import selftest
from feddra_ds.doctor.machine import check_disk, check_network, check_software
from feddra_ds.evaluation.models import open_models
from feddra_ds.model.folder import load_pretrained

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def feddra(*words: object, expect: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "feddra_ds", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def told(capsys: pytest.CaptureFixture[str], *words: object, expect: int = 0) -> dict[str, Any]:
    """The JSON object that a command prints, run in this process."""
    assert main([*map(str, words), "--json"]) == expect
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds over three clients of the helpers' data, trained by `feddra-ds train`."""
    work = tmp_path_factory.mktemp("trained")
    root = write_dataset(work / "data", num_val=12)
    config = tree(root, work / "run", aggregate__ema=0.5)
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    done = feddra("train", "--config", work / "config.yaml")
    assert "round 1 (2/2) stage2: 3 clients × 3 steps, loss" in done.stderr, "a pipe gets plain lines"
    assert "\x1b" not in done.stderr
    return work / "run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, data) with a held-out client, a client without val, labels and reports that repeat; the model is untrained."""
    work = tmp_path_factory.mktemp("exported")
    data = make_data(work / "data")
    run = work / "run"
    config = make_config(run, data)
    make_run(run, config, [make_line(r) for r in range(3)])
    add_model(run / "model", config)
    return run, data


def test_evaluate_agrees_with_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    result = told(capsys, "evaluate", trained, "--bootstrap", 50)
    assert result["model"] == str(trained / "model")
    for client, expected in line["val"].items():
        found = result["pooled"] if client == "all" else result["clients"][client]
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, abs=0.04 if "recall" in key else 1e-9), (client, key)
    assert result["control_at_chance"] is None
    assert set(result["zero_shot"]) == {"kind"}
    assert result["zero_shot"]["kind"]["classes"] == 3


def test_the_newest_checkpoint_stands_in_for_a_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going = tmp_path / "going"
    going.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints", "progress.json"):
        (going / name).symlink_to(trained / name)
    models = open_models(going, "cpu")
    assert models.source == going / "checkpoints" / "round-000001"
    words = ("--bootstrap", 20, "--no-zero-shot")
    a, b = (told(capsys, "evaluate", run, *words) for run in (going, trained))
    assert a["pooled"] == b["pooled"]


def test_the_average_over_rounds_is_measured_and_exported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--ema", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    exported = load_pretrained(tmp_path / "out")[0].state_dict()
    first, last = (weights_of(trained, number) for number in (0, 1))
    for name, values in last.items():  # β = 0.5 and two rounds: weights as 1 to 2
        np.testing.assert_allclose(exported[name].flatten(), first[name] / 3 + 2 * values / 3, atol=1e-6, err_msg=name)
    kept = (trained / "evaluation.json").read_text() if (trained / "evaluation.json").exists() else None
    words = ("--data", trained.parent / "data", "--bootstrap", 20, "--no-zero-shot")
    of_average, of_export, of_model = (
        told(capsys, "evaluate", *what, *words)
        for what in ((trained, "--ema"), (tmp_path / "out",), (trained / "model",))
    )
    assert of_average["ema"]
    assert of_average["clients"] == of_export["clients"] != of_model["clients"]
    now = (trained / "evaluation.json").read_text() if (trained / "evaluation.json").exists() else None
    assert kept == now, "the report shows the global model"


def test_status_and_report_of_the_trained_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(trained)]) == 0
    status = capsys.readouterr().out
    assert "feddra, finished (all rounds are done)" in status
    assert "last checkpoint: " in status
    assert f"Next:\n  feddra-ds report {trained}" in status
    assert main(["report", str(trained), "--examples", "2"]) == 0
    report = capsys.readouterr().out
    assert f"wrote {trained}/report.html" in report
    page = (trained / "report.html").read_text()
    assert page.count("its report is found at place") == 2
    assert "3 of 3 clients" in page or "of 3 clients" in page


def test_evaluate_shows_everything_a_reader_needs(
    exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = exported
    assert main(["evaluate", str(run), "--bootstrap", "50"]) == 0
    text = capsys.readouterr().out
    rows = {
        line.split("│")[0].strip(): line for line in reversed(text.splitlines()) if "│" in line
    }  # of the first table
    assert {"north", "south_and_the_islands", "mean", "worst", "spread", "all, one gallery"} <= set(rows)
    assert f"{HELD_OUT} (held out, test)" in rows
    assert "0.33 → 0.28" in rows["north"]
    assert "no val split, so not measured: west" in text
    assert "recall@5 beyond chance" in text
    assert "× chance" in text
    assert "odd" in rows
    assert "view" in rows
    assert f"Next:\n  feddra-ds evaluate {run} --data {data} --shuffled-texts" in text
    assert f"feddra-ds probe {run} --data {data} --label-key odd" in text


def test_evaluate_an_export_alone(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = exported
    alone = tmp_path / "export"
    alone.symlink_to(run / "model")
    result = told(capsys, "evaluate", alone, "--data", data, "--clients", "north", "--split", "train", "--max-pairs", 7)
    assert list(result["clients"]) == ["north"]
    assert result["clients"]["north"]["pairs"] == 7
    assert result["pooled"] is None
    assert main(["evaluate", str(alone), "--data", str(data), "--bootstrap", "20"]) == 0
    assert "loss" not in capsys.readouterr().out.splitlines()[1], "an export knows no losses"


def test_the_control_and_its_exit_code(exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = told(capsys, "evaluate", exported[0], "--shuffled-texts")
    assert result["control_at_chance"] is True
    assert "zero_shot" not in result


def test_models_of_their_own(exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, data = exported
    run = tmp_path / "local"
    config = make_config(run, data, strategy={"name": "local"})
    make_run(run, config, [make_line(r) for r in range(3)])
    for number, client in enumerate(CLIENTS):
        add_model(run / "model" / client, config, seed=number)
    result = told(capsys, "evaluate", run, "--clients", "north,south_and_the_islands", "--bootstrap", 20)
    assert result["pooled"] is None
    assert len(result["clients"]) == 2
    assert main(["probe", str(run)]) == 2
    assert "each client has a model of its own" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 2
    assert f"no model of client {HELD_OUT}" in capsys.readouterr().err
    assert main(["report", str(run), "--examples", "2"]) == 0


def test_unreadable_pairs_are_counted_and_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        for number in range(12):
            image = b"broken" if number == 3 else encoded(number)
            writer.add(
                "north",
                "val",
                f"{number:03d}",
                image=image,
                text=f"report {number}",
                info=None if number else {"labels": 3},
            )
    config = make_config(tmp_path / "run", tmp_path / "data")
    config.data.max_bad_fraction = 0.2
    make_run(tmp_path / "run", config, [make_line(0, ["north"])])
    add_model(tmp_path / "run" / "model", config)
    result = told(capsys, "evaluate", tmp_path / "run", "--bootstrap", 20)
    assert result["clients"]["north"]["pairs"] == 11
    assert result["clients"]["north"]["skipped"] == {"corrupt_image": 1}
    assert main(["evaluate", str(tmp_path / "run"), "--bootstrap", "20"]) == 0
    text = capsys.readouterr().out
    assert "unreadable samples were left out: north (corrupt_image: 1)" in text
    assert "the samples have no labels that could be told apart" in text


def test_probe(exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, data = exported
    words = ("--label-key", "view", "--fractions", "0.5,1", "--repeats", 2)
    result = told(capsys, "probe", run, *words)
    view = result["labels"]["view"]
    assert view["train"] == {"north": 12, "south_and_the_islands": 12, "west": 12, HELD_OUT: 0}
    assert view["pooled_probe"]["1"]["labels"] == 36
    assert view["pooled_probe"]["0.5"]["labels"] == 18
    assert set(view["own_probe"]["1"]) == set(CLIENTS)
    assert 0 <= view["pooled_probe"]["1"]["pooled"]["auroc"] <= 1
    assert view["pooled_probe"]["1"]["west"] is None, "it has no val"
    other = told(capsys, "probe", run, *words, "--features", "embedding")
    assert other["labels"]["view"]["pooled_probe"]["1"] != view["pooled_probe"]["1"]
    assert main(["probe", str(run), "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    assert "odd: AUROC of a linear probe on backbone features" in text
    assert f"{HELD_OUT} (held out)" in text
    assert f"Next:\n  feddra-ds probe {run} --data {data} --features embedding" in text


MISTAKES = [
    (
        ["evaluate", "RUN", "--subgroup", "ages"],
        "--subgroup: no sample has a field ages; there are: odd",
    ),
    (["evaluate", "RUN", "--subgroup", "site", "--shuffled-texts"], "--shuffled-texts: takes no --subgroup"),
    (["evaluate", "RUN", "--prompts", "x.yaml", "--no-zero-shot"], "--prompts: is of zero-shot classification"),
    (["evaluate", "RUN", "--prompts", "nowhere.yaml"], "--prompts: cannot read nowhere.yaml"),
    (["evaluate", "RUN", "--compare", "RUM"], "--compare: RUM does not exist; give a run directory"),
    (
        ["evaluate", "RUN", "--save-embeddings", "x.csv"],
        "--save-embeddings: x.csv must end with .safetensors or .parquet",
    ),
    (["evaluate", "RUM"], "RUM does not exist; give a run directory"),
    (["evaluate", "RUN", "--data", "nowhere"], "nowhere is not a folder"),
    (["evaluate", "RUN", "--clients", "nort"], "no client nort under"),
    (["evaluate", "RUN", "--clients", ","], "--clients: is empty"),
    (["evaluate", "RUN", "--split", "vall"], "--split: no client under"),
    (["evaluate", "RUN/model/..", "--device", "cuda"], "cuda was asked for"),
    (["probe", "RUN", "--label-key", "odds"], "--label-key: no sample has a label odds; there are: odd, view"),
    (["probe", "RUN", "--fractions", "2"], "--fractions: 2 is no share"),
    (["probe", "RUN", "--strength", "0"], "--strength: must be above 0"),
    (["probe", "RUN", "--train-split", "test"], "has a test split to train on"),
    (["finetune", "RUN", "--fractions", "0"], "--fractions: 0 is no share"),
    (["finetune", "RUN", "--modes", "linear,whole"], "--modes: whole is none; there are linear and full"),
    (["evaluate", "RUN", "--ema"], "has no whole checkpoint, and the average over rounds"),
    (["evaluate", "RUN/model", "--ema"], "export the average with `feddra-ds export RUN --ema`"),
    (["export", "RUN", "--ema", "--client", "north", "--out", "x"], "leave out --client"),
    (["doctor", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    (["doctor", "--num-ranks", "0"], "--num-ranks: must be at least 1"),
    (["doctor", "--timeout", "0"], "--timeout: must be more than 0 seconds"),
    (["doctor", "--data.root", "x"], "--data.root: config keys need --config FILE"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_have_one_clear_line(
    exported: tuple[Path, Path], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main([word.replace("RUN", str(exported[0])) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("feddra-ds: ")


@pytest.mark.parametrize("option", ["--batch-size", "--bootstrap", "--max-pairs"])
def test_counts_start_at_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "run", option, "0"])
    assert stopped.value.code == 2
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_what_is_not_here(exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = exported
    alone = tmp_path / "export"
    alone.symlink_to(run / "model")
    gone = tmp_path / "gone"
    make_run(gone, make_config(gone, tmp_path / "lost"), [make_line(0)])
    empty = tmp_path / "empty"
    make_run(empty, make_config(empty, data), [])
    unlabelled = tmp_path / "unlabelled"
    with DatasetWriter(unlabelled) as writer:
        for split in ("train", "val"):
            for number in range(4):
                writer.add("north", split, f"{split}{number}", image=encoded(number), text=f"report {number}")
    cases = [
        (["evaluate", alone], "--data: is needed, because"),
        (["evaluate", empty], "has neither a model/ nor a whole checkpoint yet"),
        (["probe", alone, "--data", unlabelled], "has no label to predict"),
    ]
    (gone / "model").symlink_to(run / "model")
    cases.append((["evaluate", gone], f"the run's data.root {tmp_path / 'lost'} is not here"))
    for words, message in cases:
        assert main([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err


def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    result = told(capsys, "doctor", "--timeout", 240)
    levels = {finding["what"]: finding["level"] for finding in result["findings"]}
    assert result["problems"] == 0
    assert levels["deepspeed"] == levels["gloo"] == levels["python"] == levels["packages"] == "ok"


def test_doctor_on_a_config(exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, data = exported
    out = tmp_path / "run"
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            tree(
                data,
                out,
                evaluation__every=0,
                data__batch_size=4,
                dro__evaluation_batch_size=4,
                dro__evaluate_on="train",
            )
        )
    )
    words = ["doctor", "--no-self-test", "--config", str(path)]
    assert main([*words, "--num-ranks", "2", "--dro.evaluation_pairs", "64"]) == 0
    text = capsys.readouterr().out
    assert "2 ranks = 2 slots × 1 rank, 3 clients, at most 2 per slot" in text
    assert "slots host 1 or 2 clients" in text
    assert "36 train pairs: north 12, south_and_the_islands 12, west 12" in text
    assert "a round shows every client 20 pairs, 1.7 × all of north's" in text
    assert "of train pairs, fewer than dro.evaluation_pairs = 64 move p: north 12, " in text
    assert "in the alignment module" in text
    assert "0 problems" in text
    assert (
        f"Next:\n  deepspeed --num_accelerators 2 --module feddra_ds train --config {path} --dro.evaluation_pairs 64"
        in text
    )
    assert not out.exists(), "it looks and writes nothing"

    assert main([*words, "--num-ranks", "4", "--run.sed", "1", "--data.batch_size", "0"]) == 1
    text = capsys.readouterr().out
    assert "problem  run.sed: unknown key; did you mean run.seed?" in text
    assert "problem  data.batch_size: " in text
    assert "Next:\n  mend the problems above" in text

    assert main([*words, "--data.batch_size", "64", "--clients.minimum", "2"]) == 1
    assert (
        "fewer train pairs than a batch of 64: north (12), south_and_the_islands (12), west (12); lower"
        in capsys.readouterr().out
    )
    assert main([*words, "--num-ranks", "4", "--topology.ranks_per_slot", "3"]) == 1
    assert "4 ranks do not divide into slots of 3" in capsys.readouterr().out
    assert main([*words, "--model.text.tokenizer", str(tmp_path / "none")]) == 1
    assert "problem  model.text.tokenizer: cannot load a tokenizer" in capsys.readouterr().out
    assert main([*words, "--run.output_dir", "/proc/nothing/here"]) == 1
    text = capsys.readouterr().out
    assert "problem  disk: " in text
    assert "/proc/nothing/here" in text


def test_the_self_test_is_bounded_and_says_who_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = selftest.run(0.2)
    assert outcome.problem == "rank 0 did not end within 0.2 s"
    assert outcome.seconds < 30
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    outcome = selftest.run(240)
    assert outcome.problem is not None
    assert "ended with 1: " in outcome.problem
    assert outcome.seconds < 200, "the other rank, which waits for the one that failed, is not waited for"


def test_findings_on_the_network_and_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    (wrong,) = [f for f in check_network() if f.level == "problem"]
    assert wrong.what == "GLOO_SOCKET_IFNAME"
    assert "choose one of lo" in wrong.todo
    assert next(iter(check_disk(tmp_path / "new" / "run", 1000))).level == "ok"
    (full,) = check_disk(tmp_path, 10**18)
    assert (full.level, "checkpoint.keep" in full.todo) == ("problem", True)
    (tmp_path / "file").write_text("")
    (blocked,) = check_disk(tmp_path / "file" / "run", None)
    assert blocked.level == "problem"


def test_a_lock_of_a_killed_build_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not [f for f in check_software() if str(lock) in f.found], "a build may be going on"
    os.utime(lock, (0, 0))
    (left,) = [f for f in check_software() if str(lock) in f.found]
    assert (left.level, left.todo) == ("warning", f"rm {lock}")
