"""Specs and grids: what is wrong has a line, ids and fingerprints stand still, dev and test seeds stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from feddra_ds.cli import main
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.experiments.grid import Grid, expand, fill
from feddra_ds.experiments.rows import RowsFile
from feddra_ds.experiments.runner import check_test_rows, pending
from feddra_ds.experiments.shipped import names
from feddra_ds.experiments.spec import load

SPEC: dict[str, Any] = {
    "name": "mine",
    "base": "quickstart",
    "data": {"synth": {"num_pairs": 100}},
    "arms": {"fedavg": {"strategy.name": "fedavg"}, "feddra": {"strategy.name": "feddra", "dro": {"radius": 2.0}}},
    "seeds": {"dev": [0, 1], "test": [10]},
    "baseline": "fedavg",
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes, sort_keys=False))
    return path


def grid(folder: Path, kind: Any = "dev", only: Any = None, **changes: Any) -> Grid:
    path = write(folder, **changes)
    return expand(load(path), path, kind, only)


@pytest.mark.parametrize("name", names())
def test_shipped_specs_hold(name: str) -> None:
    spec = load(name)
    assert spec.about.endswith(".")
    assert spec.name == name
    for kind in ("dev", "test"):
        if getattr(spec.seeds, kind):
            found = expand(spec, name, kind)
            assert spec.baseline in found.arms or set(found.controls) < set(found.arms)
            assert len({run.id for run in found.runs}) == len(found.runs)


def test_runs_are_arms_times_seeds_seed_by_seed(tmp_path: Path) -> None:
    found = grid(tmp_path)
    assert [run.id for run in found.runs] == ["fedavg-seed0", "feddra-seed0", "fedavg-seed1", "feddra-seed1"]
    assert found.runs[1].tree["dro"]["radius"] == 2.0
    assert found.runs[1].tree["objective"]["anchor_weight"] == 1.0, "the base's keys"
    common = grid(tmp_path, common={"dro": {"step_size": 0.1, "radius": 9.0}}).runs[1].tree["dro"]
    assert (common["step_size"], common["radius"]) == (0.1, 2.0), "an arm's section joins that of all arms"
    assert [run.id for run in grid(tmp_path, "test").runs] == ["fedavg-seed10", "feddra-seed10"]


def test_a_grid_is_every_combination_on_every_arm(tmp_path: Path) -> None:
    found = grid(tmp_path, grid={"dro.radius": [0.5, 1.0], "dro.center": ["uniform", "samples"]}, baseline=None)
    assert len(found.arms) == 8
    assert found.arms[0] == "fedavg, radius=0.5, center=uniform"
    alone = grid(tmp_path, arms={}, grid={"optimizer.lr": [1e-3, 1e-4]}, baseline=None)
    assert alone.arms == ("lr=0.001", "lr=0.0001")
    assert all("/" not in run.id and " " not in run.id for run in (*found.runs, *alone.runs))


def test_a_control_is_the_same_arm_on_shuffled_texts(tmp_path: Path) -> None:
    found = grid(tmp_path, controls=True, baseline=None)
    assert found.arms == ("fedavg", "fedavg, shuffled", "feddra", "feddra, shuffled")
    assert found.controls == {"fedavg": "fedavg, shuffled", "feddra": "feddra, shuffled"}
    assert [run.shuffled for run in found.runs[:4]] == [False, True, False, True]
    assert found.runs[0].tree == found.runs[1].tree
    fingerprints = {run.fingerprint for run in found.runs}
    assert len(fingerprints) == len(found.runs)
    assert {run.fingerprint for run in grid(tmp_path, baseline=None).runs} < fingerprints, (
        "the arms stay what they were"
    )


def test_fingerprints_change_with_what_decides_and_with_nothing_else(tmp_path: Path) -> None:
    first = grid(tmp_path)
    same = grid(tmp_path, metrics=["loss"], seeds={"dev": [0, 1, 2], "test": [10]}, limit_s=5)
    assert {run.fingerprint for run in first.runs} < {run.fingerprint for run in same.runs}
    assert same.fingerprint == first.fingerprint
    assert len({run.fingerprint for run in same.runs}) == 6
    for changes in ({"common": {"optimizer.lr": 1e-4}}, {"data": {"synth": {"num_pairs": 101}}},
                    {"evaluate": {"split": "val"}}):  # fmt: skip
        other = grid(tmp_path, **changes)
        assert not {run.fingerprint for run in first.runs} & {run.fingerprint for run in other.runs}
    more = grid(tmp_path, arms={**SPEC["arms"], "local": {"strategy.name": "local"}})
    assert {run.fingerprint for run in first.runs} < {run.fingerprint for run in more.runs}, (
        "another arm changes no run"
    )


def test_an_arm_may_read_anothers_run(tmp_path: Path) -> None:
    arms = {
        "reads": {"strategy.name": "fedavg", "model.pretrained": "{run:local}/model"},
        "local": {"strategy.name": "local"},
    }
    found = grid(tmp_path, arms=arms, baseline=None)
    assert [run.arm for run in found.runs[:2]] == ["local", "reads"], "what is read comes first"
    assert found.needed == {"local"}
    assert fill(found.runs[1].tree, {"local": "/x"})["model"]["pretrained"] == "/x/model"
    assert [run.arm for run in grid(tmp_path, arms=arms, baseline=None, only=["reads"]).runs[:2]] == ["local", "reads"]
    changed = grid(tmp_path, arms=arms | {"local": {"strategy.name": "local", "optimizer.lr": 1e-4}}, baseline=None)
    assert changed.runs[1].fingerprint != found.runs[1].fingerprint, "what an arm reads decides its result"
    with pytest.raises(ConfigError, match=r"arm a: \{run:b\} names no arm"):
        grid(tmp_path, arms={"a": {"model.pretrained": "{run:b}"}}, baseline=None)
    with pytest.raises(ConfigError, match="back to itself"):
        grid(tmp_path, arms={n: {"model.pretrained": f"{{run:{m}}}"} for n, m in ("ab", "ba")}, baseline=None)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"arms": {"a": {"dro.radus": 1}}, "baseline": None}, "arm a: dro.radus: unknown key; did you mean dro.radius"),
        ({"baseline": "fedavq"}, "baseline: there is no arm fedavq; there are: fedavg, feddra"),
        ({"seeds": {"dev": [1, 2], "test": [2]}}, "seeds: 2 are dev and test seeds; what chose cannot test"),
        ({"seeds": {"test": [2]}}, "seeds.dev: "),
        ({"seeds": {"dev": [1, 1]}}, "seeds.dev: a seed is named twice"),
        ({"data": {}}, "data: give one of synth, convert and path, got none"),
        ({"data": {"synth": {"num_pairs": 5}}}, "data.synth: num-pairs: must be at least 20, got 5"),
        ({"data": {"synth": {"pairs": 5}}}, "data.synth.pairs: there is no such key"),
        ({"base": "quickstrat"}, "--config: cannot read quickstrat"),
        ({"arms": {}}, "arms: give arms, grid, or both"),
        ({"name": None}, "name: "),
        ({"controls": True}, "baseline: goes without controls"),
        (
            {"controls": True, "baseline": None, "arms": {"a": {}, "a, shuffled": {}}},
            "arms: a, shuffled is the name of a control",
        ),
    ],
)  # fmt: skip
def test_mistakes_have_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, line: str) -> None:
    path = write(tmp_path, **changes)
    assert main(["experiment", "run", str(path), "--dry-run"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def test_a_spec_that_is_not_there_says_which_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "run", "heterogenity", "--dry-run"]) == 2
    assert "heterogeneity" in capsys.readouterr().err


def test_dry_run_lists_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    first = expand(load(path), path, "dev").runs[0]
    out.mkdir()
    RowsFile(out / "rows.jsonl").append(row(first, "ok"))
    assert main(["experiment", "run", str(path), "--dry-run", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("done   fedavg-seed0")
    assert lines[1].startswith("to do  feddra-seed0")
    assert lines[-1] == "3 of 4 runs of mine are to do, on dev seeds"


def row(run: Any, status: str, arms_fingerprint: str = "") -> dict[str, Any]:
    return {"experiment": "mine", "id": run.id, "fingerprint": run.fingerprint, "status": status, "kind": run.kind,
            "arms_fingerprint": arms_fingerprint}  # fmt: skip


def test_what_crashed_or_was_changed_is_pending(tmp_path: Path) -> None:
    found = grid(tmp_path)
    a, b, c, _ = found.runs
    rows = [row(a, "ok"), row(b, "ok"), row(b, "crashed"), row(c, "ok") | {"fingerprint": "other"}]
    assert pending(found, rows) == list(found.runs[1:])
    assert pending(found, rows, "elsewhere") == list(found.runs)
    assert pending(found, [row(a, "ok") | {"data": "elsewhere"}], "elsewhere") == list(found.runs[1:])


def test_test_seeds_are_looked_at_once(tmp_path: Path) -> None:
    found = grid(tmp_path, "test")
    changed = grid(tmp_path, "test", common={"optimizer.lr": 1e-4})
    looked = [row(found.runs[0], "ok", found.fingerprint)]
    check_test_rows(found, looked)  # a run that was cut off goes on
    check_test_rows(grid(tmp_path, "dev", common={"optimizer.lr": 1e-4}), looked)
    with pytest.raises(ConfigError, match="--again"):
        check_test_rows(changed, looked)


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = RowsFile(path)
    file.append({"experiment": "e", "id": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"experiment": "e", "i')
    again = RowsFile(path)
    assert again.rows == [{"experiment": "e", "id": "a"}]
    assert path.read_bytes() == whole
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(DataError, match="line 1 is not JSON"):
        RowsFile(path)
