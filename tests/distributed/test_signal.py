"""The losses that move p: of which pairs they are, and what becomes of them before p follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NUM_VAL, build_run, finish, metrics_of, on_each, on_ranks, run_all, tree, write_dataset

FIXED = {"dro__evaluation_sample": "fixed"}
FAST = {"schedule__stage1_steps": 1, "schedule__stage2_steps": 1, "evaluation__every": 0, "checkpoint__every": 10}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("signal") / "data")


@pytest.fixture(scope="module")
def without_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("signal") / "no val", num_val=0)


# ---- inside a rank
def with_told(config_tree: dict[str, Any], told: dict[str, list[float]]) -> list[float] | None:
    """The rounds that are left, in which each client has the losses that `told` gives it; where p's losses then stand."""
    from feddra_ds.federation.protocol import Loss

    run = build_run(config_tree)
    numbers = {name: iter(values) for name, values in told.items()}
    run.loss_of = lambda data, draw: Loss(next(numbers[data.source.name]), 0.1)
    run.rounds()
    smoothed = None if run.coordinator is None else run.coordinator.smoothed.tolist()
    finish(run)
    return smoothed


def pairs_seen(config_tree: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """By client: the keys of the pairs of all training batches of two epochs, and of each round's losses."""
    run = build_run(config_tree)
    out = {}
    for client in run.clients:
        train = [key for batch in client.data.batches(client.position, 8) for key in batch.keys]
        rounds = [
            [key for batch in client.val.evaluation_batches(12, 6, draw=draw) for key in batch.keys]
            for draw in (0, 1, 0)
        ]
        out[client.id] = {"train": train, "rounds": rounds}
    finish(run)
    return out


# ---- which pairs
def test_a_client_without_a_val_split_keeps_a_slice_of_its_training_pairs(without_val: Path, tmp_path: Path) -> None:
    more = {"dro__evaluate_on": "val", "dro__holdout_fraction": 0.5, "data__batch_size": 6, **FAST}
    a, b = on_each(pairs_seen, [(tree(without_val, tmp_path / name, **more),) for name in ("a", "b")])
    assert a == b
    for seen in a[0].values():
        first, second, again = seen["rounds"]
        assert not set(seen["train"]) & set(first)
        assert sorted(first) != sorted(second) or first != second
        assert first == again
        assert len(set(first)) == len(first)
    on_ranks(run_all, 2, tree(without_val, tmp_path / "run", topology__ranks_per_slot=1, **more))
    line = metrics_of(tmp_path / "run")[-1]
    assert None not in line["client_losses"] + line["client_losses_se"] + line["client_train_losses"]


@pytest.mark.slow
def test_val_train_and_anchors_agree_where_they_are_of_the_same_pairs(dataset: Path, tmp_path: Path) -> None:
    """One epoch is one batch: the anchors of a round's first stage are of all training pairs, as is the train sample."""
    same = write_dataset(tmp_path / "same", dict.fromkeys(["north", "south"], 8), num_val=0)
    more = {"data__batch_size": 8, "dro__evaluation_batch_size": 8, "dro__evaluation_pairs": 8, **FAST}
    more |= {
        "schedule__rounds": 3,
        "data__augment__crop_scale": 1.0,
        "data__augment__brightness": 0.0,
        "dro__radius": 0.0,
    }
    train, anchors = (
        on_each(run_all, [(tree(same, tmp_path / kind, dro__evaluate_on=kind, **more),)])
        and metrics_of(tmp_path / kind)
        for kind in ("train", "anchors")
    )
    # those of the model that round 0 ended with: measured at its end, or read off round 1's anchors
    np.testing.assert_allclose(train[0]["client_losses"], anchors[1]["client_losses"], atol=1e-5)
    assert train[0]["client_train_losses"] == [None, None]
    for path in same.glob("*/index.json"):
        index = json.loads(path.read_text())
        index["splits"]["val"] = index["splits"]["train"]
        path.write_text(json.dumps(index))
    on_each(run_all, [(tree(same, tmp_path / "val", dro__evaluate_on="val", **more),)])
    for a, b in zip(train, metrics_of(tmp_path / "val"), strict=True):
        np.testing.assert_allclose(a["client_losses"], b["client_losses"], atol=1e-6)
        np.testing.assert_allclose(b["client_losses"], b["client_train_losses"], atol=1e-6)


@pytest.mark.slow
def test_fixed_pairs_are_every_round_s_and_fresh_ones_are_not(dataset: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the model stays, so that only the pairs can change a loss."""
    more = {"optimizer__lr": 1e-12, "schedule__rounds": 3, "dro__evaluate_on": "train", **FAST}
    for name, kind in (("fixed", FIXED), ("fresh", {})):
        on_each(run_all, [(tree(dataset, tmp_path / name, **more, **kind),)])
    fixed, fresh = metrics_of(tmp_path / "fixed"), metrics_of(tmp_path / "fresh")
    assert fixed[2]["client_losses"] == pytest.approx(fixed[0]["client_losses"], abs=1e-6)
    assert np.ptp([line["client_losses"] for line in fresh], axis=0).min() > 1e-3
    for line in fresh:
        assert all(se > 0 for se in line["client_losses_se"])


def test_too_few_val_pairs_are_refused_by_client(dataset: Path, tmp_path: Path) -> None:
    from helpers import make_config

    from feddra_ds.common.errors import ConfigError
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.run.checks import check

    config = make_config(dataset, tmp_path, dro__evaluate_on="val", dro__evaluation_batch_size=8)
    with pytest.raises(
        ConfigError, match=r"dro\.evaluation_batch_size: fewer val pairs than 8: north \(6\), .*set it to 6"
    ):
        check(config, Launch(0, 1, 0, "127.0.0.1", 0))


# ---- what becomes of them
def test_smoothed_losses_are_the_average_of_the_rounds_and_survive_a_resume(dataset: Path, tmp_path: Path) -> None:
    more = {"dro__loss_smoothing": 0.5, "dro__evaluate_on": "train", "dro__ascent": "from_center", **FAST}
    told = {"north": [4.0, 2.0], "south": [1.0, 1.0], "west": [2.0, 4.0]}
    config = tree(dataset, tmp_path, schedule__rounds=1, **(more | {"checkpoint__every": 1}))
    on_each(with_told, [(config, told)])
    config["schedule"]["rounds"] = 2
    ((smoothed,),) = on_each(with_told, [(config, {name: values[1:] for name, values in told.items()})])
    assert smoothed == [3.0, 1.0, 3.0]
    first, second = metrics_of(tmp_path)
    assert first["followed_losses"] == [4.0, 1.0, 2.0]
    assert second["followed_losses"] == [3.0, 1.0, 3.0]
    assert second["next_client_weights"][0] == pytest.approx(second["next_client_weights"][2], abs=1e-12)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_excess_is_what_a_client_s_own_model_would_do_better(dataset: Path, tmp_path: Path, world_size: int) -> None:
    more = {"topology__ranks_per_slot": world_size, **FIXED, **FAST}
    local, run = tmp_path / "local", tmp_path / "run"
    on_ranks(run_all, world_size, tree(dataset, local, strategy__name="local", **more))
    own = metrics_of(local)[-1]["client_losses"]
    excess = {"dro__loss": "excess", "dro__reference": str(local)}
    on_ranks(run_all, world_size, tree(dataset, run, **excess, **more))
    for line in metrics_of(run):
        np.testing.assert_allclose(line["reference_losses"], own, atol=1e-6)
        followed = np.array(line["client_losses"]) - own
        np.testing.assert_allclose(line["followed_losses"], followed, atol=1e-6)


def test_a_reference_that_does_not_fit_is_refused_by_key(dataset: Path, tmp_path: Path) -> None:
    from helpers import make_config

    from feddra_ds.common.errors import ConfigError
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.run.checks import check

    with pytest.raises(ConfigError, match=r"dro\.reference: goes with dro\.loss=excess"):
        make_config(dataset, tmp_path, dro__loss="excess")
    on_each(run_all, [(tree(dataset, tmp_path / "shared", schedule__rounds=1, **FAST),)])
    for folder, said in (("nowhere", "has no whole checkpoint"), ("shared", "is a run of feddra")):
        config = make_config(dataset, tmp_path / "run", dro__loss="excess", dro__reference=str(tmp_path / folder))
        with pytest.raises(ConfigError, match=said):
            check(config, Launch(0, 1, 0, "127.0.0.1", 0))
    assert config.dro.evaluation_batch_size <= NUM_VAL
