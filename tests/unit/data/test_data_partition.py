"""Dealing out by a Dirichlet draw, and the shuffled-text control."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_dataset

from feddra_ds.cli import main
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.sources import partition, shift


def run(*words: str) -> int:
    return main(["data", "partition", *words])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", {"a": {"train": 40, "val": 10}, "b": {"train": 20, "val": 6}})
    return tmp_path / "data"


def texts(root: Path, split: str) -> dict[str, list[str]]:
    dataset = open_dataset(root)
    out = {}
    for client in dataset.client_ids:
        if dataset.num_samples(client, split):
            part = dataset.samples(client, split)
            out[client] = [part.read_text(i).decode() for i in range(len(part))]
    return out


def test_every_pair_goes_to_one_client_and_splits_stay(root: Path, tmp_path: Path, capsys) -> None:
    assert run(str(root), "--out", str(tmp_path / "out"), "--num-clients", "3", "--label", "odd", "--seed", "1") == 0
    assert "Next:" in capsys.readouterr().out
    assert open_dataset(tmp_path / "out").client_ids == ["client0", "client1", "client2"]
    for split in ("train", "val"):
        before = sorted(t for own in texts(root, split).values() for t in own)
        assert sorted(t for own in texts(tmp_path / "out", split).values() for t in own) == before
    owners: dict[str, set[str]] = {}
    dataset = open_dataset(tmp_path / "out")
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            part = dataset.samples(client, split)
            for i in range(len(part)):
                info = part.read_info(i)
                owners.setdefault(info["patient"], set()).add(client)
    assert all(len(clients) == 1 for clients in owners.values()), "a patient goes to one client"


def test_the_same_seed_deals_the_same(root: Path, tmp_path: Path) -> None:
    for name, seed in (("x", "4"), ("y", "4"), ("z", "5")):
        assert (
            run(str(root), "--out", str(tmp_path / name), "--num-clients", "2", "--seed", seed, "--label", "site") == 0
        )
    assert texts(tmp_path / "x", "train") == texts(tmp_path / "y", "train") != texts(tmp_path / "z", "train")


def test_alpha_sets_how_different_clients_are() -> None:
    units = [(f"label{n % 4}", 1) for n in range(2000)]

    def spread(alpha: float) -> float:
        """Mean over clients of the largest label's share: 1/4 when all are alike."""
        out = []
        for seed in range(5):
            owner = partition.deal(units, 5, alpha, 1, seed)
            for client in range(5):
                mine = Counter(units[i][0] for i in np.flatnonzero(owner == client))
                out.append(max(mine.values()) / mine.total())
        return float(np.mean(out))

    assert spread(1000.0) < 0.27
    assert spread(0.1) > 0.6


def test_the_shift_is_told_beside_alpha(root: Path, tmp_path: Path, capsys) -> None:
    said = {}
    for alpha in ("0.1", "1000"):
        words = ["--num-clients", "2", "--label", "site", "--alpha", alpha, "--seed", "3", "--min-pairs", "5"]
        assert run(str(root), "--out", str(tmp_path / alpha), *words) == 0
        said[alpha] = capsys.readouterr().out
    dataset = open_dataset(tmp_path / "0.1")
    shares, sizes = [], []
    for client in dataset.client_ids:
        part = dataset.samples(client, "train")
        sites = Counter(part.read_info(i)["site"] for i in range(len(part)))
        shares.append(sites["a"] / sites.total())
        sizes.append(sites.total())
    assert sum(sizes) == 60
    # two sites: the total variation is the difference of one's shares; 40 of the 60 pairs are of site a
    distances = [abs(share - 2 / 3) for share in shares]
    assert f"differ from the pooled by {np.mean(distances):.2f} in the mean" in said["0.1"]
    assert f"most client{int(np.argmax(distances))} by {max(distances):.2f}" in said["0.1"]
    (row,) = [line.replace("│", "").split() for line in said["0.1"].splitlines() if line.startswith("site=a")]
    assert row == ["site=a", "0.667", f"{min(shares):.3g}", f"{max(shares):.3g}"]
    mean = lambda text: float(re.search(r"pooled by ([\d.]+)", text).group(1))
    assert mean(said["0.1"]) > 0.1 > mean(said["1000"])


def test_labels_dealt_together_have_a_row_each(root: Path, tmp_path: Path, capsys) -> None:
    assert run(str(root), "--out", str(tmp_path / "out"), "--num-clients", "2", "--alpha", "0.1") == 0
    out = capsys.readouterr().out
    assert "shift at --alpha 0.1: clients' labels together differ" in out
    assert [line.replace("│", "").split()[:2] for line in out.splitlines() if line.startswith("odd=")] == [
        ["odd=1", "0.5"]
    ]


def test_the_shift_of_random_deals_is_the_floor() -> None:
    labels = [f"{n % 40}" for n in range(400)]
    owners = [f"c{n // 80}" for n in range(400)]  # every client has two of each label: alike
    alike = shift.measure_shift(owners, labels, [[label] for label in labels], 0)
    assert alike.distance == pytest.approx(0, abs=1e-12)
    assert 0.2 < alike.by_chance < 0.4
    apart = shift.measure_shift([f"c{int(label) // 8}" for label in labels], labels, [[] for _ in labels], 0)
    assert (apart.distance, apart.largest) == pytest.approx((0.8, 0.8))


def test_every_client_gets_its_minimum_or_it_is_said() -> None:
    units = [(f"label{n % 2}", 1) for n in range(60)]
    for seed in range(5):
        assert np.bincount(partition.deal(units, 4, 0.3, 5, seed), minlength=4).min() >= 5
    with pytest.raises(
        DataError, match=r"--min-pairs: no draw of 100 gives every client 30 train pairs \(the best gave \d+\)"
    ):
        partition.deal(units, 4, 0.3, 30, 0)


def test_whole_units_stay_together() -> None:
    units = [("x", 7), ("x", 1), ("y", 3)]
    owner = partition.deal(units, 2, 1.0, 0, 0)
    assert owner.shape == (3,)
    assert set(owner.tolist()) <= {0, 1}


def test_the_control_moves_every_train_text_and_no_val_text(root: Path, tmp_path: Path) -> None:
    assert run(str(root), "--out", str(tmp_path / "control"), "--keep-clients", "--shuffle-texts") == 0
    before, after = open_dataset(root), open_dataset(tmp_path / "control")
    assert after.client_ids == before.client_ids
    for client in before.client_ids:
        for split, moved in (("train", True), ("val", False)):
            old, new = before.samples(client, split), after.samples(client, split)
            assert sorted(old.text_ids.tolist()) == sorted(new.text_ids.tolist())
            told = {old.read_image(i): old.read_text(i) for i in range(len(old))}
            same = sum(told[new.read_image(i)] == new.read_text(i) for i in range(len(new)))
            assert same == (0 if moved else len(new))


def test_held_out_clients_stay_held_out_in_the_control(tmp_path: Path) -> None:
    from data_helpers import encoded

    from feddra_ds.data.format.writer import DatasetWriter

    with DatasetWriter(tmp_path / "data") as writer:
        writer.held_out.append("far")
        for client, split in (("near", "train"), ("far", "test")):
            for n in range(3):
                writer.add(
                    client,
                    split,
                    f"{client}{n}",
                    image=encoded(n, form="PNG"),
                    suffix="png",
                    text=f"{client} {n}",
                    info={},
                )
    assert run(str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--keep-clients", "--shuffle-texts") == 0
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.client_ids, dataset.held_out) == (["near"], ["far"])
    assert dataset.num_samples("far", "test") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-clients", "0"], "--num-clients: must be at least 1, got 0"),
        (["--alpha", "0"], "--alpha: must be above 0, got 0.0"),
        (["--keep-clients"], "--keep-clients: with nothing to change"),
        (["--label", "od"], "--label: no pair under {root} has od; did you mean odd? There are: odd, site"),
        (["--num-clients", "50", "--min-pairs", "5"], "--min-pairs: no draw of 100"),
    ],
)
def test_mistakes_have_one_clear_line(root: Path, tmp_path: Path, capsys, words: list[str], message: str) -> None:
    assert run(str(root), "--out", str(tmp_path / "out"), *words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("feddra-ds: " + message.format(root=root))
    assert not (tmp_path / "out").exists()


def test_root_and_out_must_differ(root: Path, capsys) -> None:
    assert run(str(root), "--out", str(root), "--overwrite") == 2
    assert capsys.readouterr().err.startswith("feddra-ds: --out: must be another folder than ROOT")
    assert open_dataset(root).client_ids == ["a", "b"]
