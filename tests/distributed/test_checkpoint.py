"""Checkpoints: whole or not there, loadable at any number of ranks, and a resumed run equal to one that was never cut."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    assemble,
    build_run,
    finish,
    largest_difference,
    metrics_of,
    on_each,
    on_ranks,
    pieces_of,
    run_all,
    same_bits,
    tree,
    weights_of,
    write_dataset,
    zero,
)
from spawn import free_port

ADAMW = {"optimizer__name": "adamw", "optimizer__lr": 3e-4, "optimizer__weight_decay": 0.05}
MORE = {**ADAMW, "optimizer__max_skipped_steps": 4}


# ---- inside a rank
def load_and_go_on(config_tree: dict[str, Any]) -> dict[str, Any]:
    """What the engine and the server hold right after a resume; then the rounds that are left."""
    run = build_run(config_tree)
    seen = {
        "next_round": run.next_round,
        "engine": pieces_of(run.engine),
        "server": [
            (f.name, f.start, v.clone().numpy())
            for part in ("aligner", "backbone")
            for f, v in run.engine.views_of(part, run.server.states["global"][part])
        ],
        "weights": run.mixture.tolist(),
        "positions": {client.id: client.position.to_dict() for client in run.clients},
    }
    run.rounds()
    finish(run)
    return seen


def cut_in(config_tree: dict[str, Any], round_index: int, stage_name: str) -> None:
    """Run until a stage of a round has trained, and stop there, as a kill would, with nothing written any more."""
    run = build_run(config_tree)
    all_clients = run.run_stage

    def stop(number: int, stage: Any) -> int:
        if (number, stage.name) == (round_index, stage_name):
            for client in run.clients:
                run.trainer.run_stage(client, stage, run.server.model_of(client), 1.0)
            raise _Cut
        return all_clients(number, stage)

    run.run_stage = stop
    with pytest.raises(_Cut):
        run.rounds()
    finish(run)


def cut_while_writing(config_tree: dict[str, Any], round_index: int) -> None:
    """As a kill while the checkpoint of a round is written and the next round trains: it is never committed."""
    from feddra_ds.run import checkpoint_writer

    run = build_run(config_tree)
    trains, commit = threading.Event(), checkpoint_writer.commit
    run_stage = run.run_stage

    def stop(number: int, stage: Any) -> int:
        if number == round_index + 1 and stage.name == "stage2":
            trains.set()
            raise KeyboardInterrupt
        return run_stage(number, stage)

    def wait_and_die(folder: Path, *args: Any) -> None:
        if folder.name.endswith(str(round_index)):
            assert trains.wait(60), "training waited for the checkpoint"
            raise _Cut
        commit(folder, *args)

    run.run_stage, checkpoint_writer.commit = stop, wait_and_die
    try:
        with pytest.raises(KeyboardInterrupt):
            run.rounds()
    finally:
        checkpoint_writer.commit = commit
    finish(run)


class _Cut(Exception):
    pass


def refusal(config_tree: dict[str, Any]) -> list[str]:
    """The problems that a run is refused with, on this rank."""
    from feddra_ds.common.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        build_run(config_tree)
    return error.value.problems


# ---- another number of ranks
LAYOUTS = {"whole": (4, 2, 2), "one": (1, 1, 0), "one3": (1, 1, 3), "four": (4, 4, 3)}


@pytest.mark.slow
def test_saved_on_two_ranks_and_loaded_on_other_numbers(dataset: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    more = {"schedule__rounds": 1, **MORE}
    on_ranks(run_all, 4, tree(dataset, saved, deepspeed=zero(2), topology__ranks_per_slot=2, **more))
    shards = sorted(p.name for p in (saved / "checkpoints/round-000000/weights/global").glob("shard-*"))
    assert shards == ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    wanted = weights_of(saved, 0)
    for name, (world_size, per_slot, stage) in LAYOUTS.items():
        out = tmp_path / name
        shutil.copytree(saved, out)
        config = tree(
            dataset, out, deepspeed=zero(stage), topology__ranks_per_slot=per_slot,
            **(more | {"schedule__rounds": 2}),
        )  # fmt: skip
        by_rank = on_ranks(load_and_go_on, world_size, config)
        assert by_rank[0]["next_round"] == 1
        for slot in range(0, world_size, per_slot):
            ranks = by_rank[slot : slot + per_slot]
            assert same_bits(assemble([r["engine"] for r in ranks]), wanted), name
            assert same_bits(assemble([r["server"] for r in ranks]), wanted), name
        assert by_rank[0]["weights"] == metrics_of(saved)[0]["next_client_weights"]
        assert by_rank[0]["positions"]["north"] == {"epoch": 1, "step": 2}  # 5 batches of 8 of 24 pairs
        lines = metrics_of(out)
        assert lines[0] == metrics_of(saved)[0]
        expected = metrics_of(tmp_path / "whole")[1]["client_losses"]
        np.testing.assert_allclose(lines[1]["client_losses"], expected, atol=1e-3)
    assert sorted(p.name for p in (saved / "model").iterdir() if "model" in p.name)  # and it was exported


@pytest.mark.slow
def test_bf16_is_loaded_to_the_bit_on_another_number_of_ranks(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__rounds": 1, "evaluation__every": 0, **MORE}
    on_each(run_all, [(tree(dataset, tmp_path, deepspeed=zero(3, bf16=True), **more),)])
    wanted = weights_of(tmp_path, 0)
    config = tree(dataset, tmp_path, deepspeed=zero(1, bf16=True), topology__ranks_per_slot=2, **more)
    by_rank = on_ranks(load_and_go_on, 2, config)
    assert same_bits(assemble([rank["engine"] for rank in by_rank]), wanted)
    assert same_bits(assemble([rank["server"] for rank in by_rank]), wanted)


# ---- broken ones
def _break(folder: Path, how: str) -> str:
    """Damage a checkpoint; what the warning says."""
    shard = next((folder / "weights/global").glob("shard-*"))
    if how == "truncated":
        with open(shard, "r+b") as file:
            file.truncate(shard.stat().st_size // 2)
        return f"has {shard.stat().st_size} bytes, not the manifest's"
    if how == "no manifest":
        (folder / "manifest.json").unlink()
        return "manifest.json cannot be read"
    if how == "half a manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:100])
        return "manifest.json cannot be read"
    if how == "one bit":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
        return "does not have the manifest's sha256"
    assert how == "no shard"
    shard.unlink()
    return "is missing"


@pytest.mark.slow
def test_broken_checkpoints_are_passed_over_and_runs_repeat_from_the_older_one(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feddra_ds.checkpoint.choose import find_newest
    from feddra_ds.checkpoint.format import check, folder_of, partial_of
    from feddra_ds.common.logs import logger

    monkeypatch.setattr(logger, "propagate", True)
    whole = tmp_path / "whole"
    config = tree(dataset, whole, schedule__rounds=3, **MORE)
    on_each(run_all, [(config,)])
    lines, last = metrics_of(whole), weights_of(whole, 2)
    assert [line["round"] for line in lines] == [0, 1, 2]
    jobs = []
    for how in ("truncated", "no manifest", "half a manifest", "one bit", "no shard"):
        out = tmp_path / how.replace(" ", "-")
        shutil.copytree(whole, out)
        message = _break(folder_of(out, 2), how)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="feddra_ds"):
            assert find_newest(out) == folder_of(out, 1)
        assert "round-000002 is passed over" in caplog.text
        assert message in caplog.text
        if how in ("truncated", "no manifest"):
            jobs.append((config | {"run": config["run"] | {"output_dir": str(out)}},))
    # cut off in the middle of writing: the folder aside is never a checkpoint
    out = tmp_path / "partial"
    shutil.copytree(whole, out)
    os.replace(folder_of(out, 2), partial_of(folder_of(out, 2)))
    assert find_newest(out) == folder_of(out, 1)
    jobs.append((config | {"run": config["run"] | {"output_dir": str(out)}},))
    assert all(seen["first_round"] == 2 for (seen,) in on_each(run_all, jobs))
    for (job,) in jobs:
        out = Path(job["run"]["output_dir"])
        assert metrics_of(out) == lines  # round 2 again, once, and bit for bit
        assert same_bits(weights_of(out, 2), last)
        assert check(folder_of(out, 2)) is None
        assert not partial_of(folder_of(out, 2)).exists()


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    from feddra_ds.checkpoint.choose import find_newest
    from feddra_ds.checkpoint.format import read_coordinator
    from feddra_ds.checkpoint.load import SavedModel
    from feddra_ds.common.errors import CheckpointError

    assert find_newest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        SavedModel(tmp_path, "global")
    with pytest.raises(CheckpointError, match=r"coordinator.json cannot be read .* is this a checkpoint\?"):
        read_coordinator(tmp_path)
    (tmp_path / "coordinator.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"coordinator.json cannot be read"):
        read_coordinator(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(dataset: Path, tmp_path: Path) -> None:
    from feddra_ds.checkpoint.format import folder_of
    from feddra_ds.checkpoint.load import SavedModel
    from feddra_ds.common.errors import CheckpointError
    from feddra_ds.engine.masters import Fragment

    on_each(run_all, [(tree(dataset, tmp_path, schedule__rounds=1, evaluation__every=0),)])
    saved = SavedModel(folder_of(tmp_path, 0), "global")
    with pytest.raises(CheckpointError, match=r"aligner\.nonsense"):
        saved.read(Fragment("aligner.nonsense", 0, 4, 0))
    name = next(iter(saved.parameters()))
    size = saved.parameters()[name].numel()
    with pytest.raises(CheckpointError, match="another model config"):
        saved.read(Fragment(name, size - 1, 2, 0))


# ---- resuming
def test_a_resumed_run_equals_one_that_was_never_interrupted(dataset: Path, tmp_path: Path) -> None:
    """Interrupted between rounds, within stage 1 and stage 2 of a round, and while a checkpoint is written beside the next
    round: all metrics to the last bit."""
    four = {"schedule__rounds": 4, **MORE}
    whole, longer, cut_1, cut_2, writing = (
        tmp_path / name for name in ("whole", "longer", "cut-1", "cut-2", "writing")
    )
    on_each(run_all, [(tree(dataset, whole, **four),), (tree(dataset, longer, **(four | {"schedule__rounds": 2})),)])
    on_each(
        cut_in,
        [(tree(dataset, cut_1, **four), 2, "stage1"), (tree(dataset, cut_2, checkpoint__every=2, **four), 3, "stage2")],
    )
    on_each(cut_while_writing, [(tree(dataset, writing, **four), 1)])
    assert [len(metrics_of(out)) for out in (longer, cut_1, cut_2, writing)] == [2, 2, 3, 2]
    seen = on_each(run_all, [(tree(dataset, out, **four),) for out in (longer, cut_1, cut_2, writing)])
    # the third had its last checkpoint after round 1; that of the fourth after round 1 was not whole
    assert [s[0]["first_round"] for s in seen] == [2, 2, 2, 1]
    for out in (longer, cut_1, cut_2, writing):
        assert metrics_of(out) == metrics_of(whole), out.name
        assert same_bits(weights_of(out, 3), weights_of(whole, 3)), out.name


@pytest.mark.slow
def test_a_resumed_run_of_two_slots_of_two_ranks_equals_one_that_was_not(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__rounds": 3, "deepspeed": zero(2), "topology__ranks_per_slot": 2, **MORE}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_ranks(run_all, 4, tree(dataset, whole, **more))
    on_ranks(cut_in, 4, tree(dataset, cut, **more), 2, "stage2")
    on_ranks(run_all, 4, tree(dataset, cut, **more))
    for a, b in zip(metrics_of(whole), metrics_of(cut), strict=True):
        for key in ("client_losses", "client_weights", "next_client_weights"):
            np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-6)
    assert largest_difference(weights_of(whole, 2), weights_of(cut, 2)) <= 1e-6


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("local", marks=pytest.mark.slow), pytest.param("centralized", marks=pytest.mark.exhaustive)],
)
def test_other_strategies_resume_as_well(dataset: Path, tmp_path: Path, strategy: str) -> None:
    more = {"strategy__name": strategy, "schedule__stage2_steps": 3, "schedule__rounds": 3, **ADAMW}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_each(run_all, [(tree(dataset, whole, **more),), (tree(dataset, cut, **(more | {"schedule__rounds": 1})),)])
    on_each(run_all, [(tree(dataset, cut, **more),)])
    assert metrics_of(whole) == metrics_of(cut)
    owners = ["north", "south", "west"] if strategy == "local" else ["global"]
    for owner in owners:
        assert same_bits(weights_of(whole, 2, owner), weights_of(cut, 2, owner))


@pytest.mark.slow
def test_p_read_off_the_anchors_resumes_as_well(dataset: Path, tmp_path: Path) -> None:
    more = {"dro__evaluate_on": "anchors", "schedule__rounds": 3, **MORE}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_each(run_all, [(tree(dataset, whole, **more),)])
    on_each(cut_in, [(tree(dataset, cut, **more), 2, "stage1")])
    on_each(run_all, [(tree(dataset, cut, **more),)])
    assert metrics_of(whole) == metrics_of(cut)


def test_changed_keys_are_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__rounds": 1, **MORE}
    on_each(run_all, [(tree(dataset, tmp_path, **more),)])
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "checkpoints/round-000000", broken)
    _break(broken, "one bit")
    changed = {"optimizer__lr": 1e-3, "run__seed": 4, "clients__ids": ["north", "south"], "schedule__stage1_steps": 1}
    changed["deepspeed__gradient_clipping"] = 1.0
    jobs = [
        {**more, **changed},
        {**more, "run__resume": "never"},
        {**more, "run__resume": str(broken)},
        {**more, "run__resume": str(tmp_path / "nowhere")},
    ]
    seen = [problems for (problems,) in on_each(refusal, [(tree(dataset, tmp_path, **job),) for job in jobs])]
    assert seen[0] == [
        f"{key}: is {now}, but the checkpoint was trained with {then}; keep it, or start anew in another run.output_dir"
        for key, now, then in [
            ("clients.ids", "['north', 'south']", "None"),
            ("deepspeed.gradient_clipping", "1.0", "None"),
            ("optimizer.lr", "0.001", "0.0003"),
            ("run.seed", "4", "3"),
            ("schedule.stage1_steps", "1", "2"),
        ]
    ]
    assert len(seen[1]) == len(seen[2]) == len(seen[3]) == 1
    assert seen[1][0].startswith(f"run.resume: never, but {tmp_path} holds checkpoints")
    assert "is not a whole checkpoint" in seen[2][0]
    assert "sha256" in seen[2][0]
    assert "manifest.json cannot be read" in seen[3][0]
    # every rank hears of it, not the coordinator alone
    by_rank = on_ranks(refusal, 2, tree(dataset, tmp_path, topology__ranks_per_slot=1, **jobs[0]))
    assert by_rank[0] == by_rank[1] == seen[0]


@pytest.mark.slow
def test_a_named_checkpoint_starts_another_run_with_free_keys_changed(dataset: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    on_each(run_all, [(tree(dataset, first, **MORE),)])
    older = str(first / "checkpoints/round-000000")
    free = {"run__resume": older, "evaluation__every": 0, "checkpoint__keep": 1, "objective__anchors": "resident"}
    (by_rank,) = on_each(run_all, [(tree(dataset, second, **(MORE | free)),)])
    assert by_rank[0]["first_round"] == 1
    lines = metrics_of(second)
    assert [line["round"] for line in lines] == [0, 1]  # the checkpoint brings its round's line along
    np.testing.assert_allclose(lines[1]["client_losses"], metrics_of(first)[1]["client_losses"], atol=1e-5)
    assert [p.name for p in (second / "checkpoints").iterdir()] == ["round-000001"]


# ---- a real kill
def _start(
    dataset: Path, out: Path, log: Path, environment: dict[str, str], changes: dict[str, Any]
) -> subprocess.Popen:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(json.dumps(tree(dataset, out, **changes)))  # JSON is YAML
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "feddra_ds", "train", "--config", str(path)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )


def _kill_in_round_3(dataset: Path, out: Path, environments: list[dict[str, str]], changes: dict[str, Any]) -> None:
    """Start a run, SIGKILL its processes while round index 2 trains, and run the same command again to its end."""
    log = out.parent / f"{out.name}.log"
    ranks = [_start(dataset, out, log, e, changes | {"schedule__stage2_steps": 3}) for e in environments]
    deadline = time.monotonic() + 300
    while len(metrics_of(out)) < 2:
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        assert all(rank.poll() is None for rank in ranks), log.read_text()[-2000:]
        time.sleep(0.01)
    time.sleep(0.05)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert all(rank.wait(30) == -signal.SIGKILL for rank in ranks)
    assert len(metrics_of(out)) in (2, 3), "the kill came too late to say anything"
    again = [{**e, **({"MASTER_PORT": str(free_port())} if "RANK" in e else {})} for e in environments]
    if len(again) > 1:
        again = [e | {"MASTER_PORT": again[0]["MASTER_PORT"]} for e in again]
    ranks = [_start(dataset, out, log, e, changes | {"schedule__stage2_steps": 3}) for e in again]
    assert all(rank.wait(300) == 0 for rank in ranks), log.read_text()[-2000:]


@pytest.mark.slow
def test_kill_9_in_round_3_and_the_same_command_again(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__rounds": 6, **MORE}
    on_each(run_all, [(tree(dataset, tmp_path / "whole", **more), True)])
    _kill_in_round_3(dataset, tmp_path / "killed", [{}], more)
    whole, killed = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "killed")
    assert [line["round"] for line in killed] == list(range(6))
    for a, b in zip(whole, killed, strict=True):
        for key in ("client_losses", "client_weights", "next_client_weights"):
            assert a[key] == b[key], (a["round"], key)
    assert same_bits(weights_of(tmp_path / "whole", 5), weights_of(tmp_path / "killed", 5))


@pytest.mark.exhaustive
def test_kill_9_in_round_3_of_four_ranks(dataset: Path, tmp_path: Path) -> None:
    more = {"schedule__rounds": 6, "deepspeed": zero(2), "topology__ranks_per_slot": 2, **MORE}
    on_ranks(run_all, 4, tree(dataset, tmp_path / "whole", **more), True)
    port = str(free_port())
    place = lambda rank: {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_PORT": port}
    ranks = [{**place(r), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} for r in range(4)]
    _kill_in_round_3(dataset, tmp_path / "killed", ranks, more)
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "killed"), strict=True):
        for key in ("client_losses", "client_weights", "next_client_weights"):
            np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-6)


def test_other_clients_are_refused(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    on_ranks(run_all, 1, tree(dataset, out, schedule__rounds=1))
    other = write_dataset(tmp_path / "data", {"east": 24, "north": 24, "west": 24})
    ((problem,),) = on_ranks(refusal, 1, tree(other, out, schedule__rounds=2))
    assert problem.startswith("data.root: its clients are east, north, west, but the checkpoint in ")
    assert "was trained with north, south, west; start anew" in problem


def test_a_run_that_starts_from_another_run_ends_with_a_model(dataset: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    on_ranks(run_all, 1, tree(dataset, first, schedule__rounds=1))
    on_ranks(run_all, 1, tree(dataset, second, schedule__rounds=1, model__pretrained=str(first)))
    assert (second / "model" / "model.safetensors").is_file()
    assert (second / "model" / "tokenizer.json").is_file()
