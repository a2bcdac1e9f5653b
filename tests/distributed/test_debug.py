"""The config's section `debug`: a line per local step with the same norms on every layout, and a profile that opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import on_each, run_all, tree, weights_of, zero

LAYOUTS: list[tuple[int, int, dict[str, Any]]] = [
    (1, 0, {}),
    (1, 0, {"data__micro_batch_size": 4}),
    (1, 2, {}),
    (2, 0, {}),
    (2, 1, {}),
    (2, 2, {}),
    (2, 3, {}),
]


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "debug" / "steps-slot0.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_a_line_per_step_knows_no_layout(dataset: Path, tmp_path: Path) -> None:
    folders = []
    for number, (ranks, stage, more) in enumerate(LAYOUTS):
        out = tmp_path / str(number)
        config = tree(
            dataset, out, deepspeed=zero(stage), topology__ranks_per_slot=ranks, debug__log_steps=True,
            schedule__rounds=1, **more,
        )  # fmt: skip
        on_each(run_all, [(config,)], world_size=ranks)
        folders.append(out)
    expected = _lines(folders[0])
    assert len(expected) == 3 * (2 + 3)  # clients × steps
    for line in expected:
        parts = {"aligner"} if line["stage"] == "stage1" else {"aligner", "backbone"}
        assert set(line["gradient_norm"]) == set(line["update_norm"]) == parts
        for part in parts:  # plain SGD with lr 0.01: the update is the gradient times the learning rate
            assert line["update_norm"][part] == pytest.approx(0.01 * line["gradient_norm"][part], rel=1e-3)
    for folder, layout in zip(folders[1:], LAYOUTS[1:], strict=True):
        for a, b in zip(expected, _lines(folder), strict=True):
            assert [a[key] for key in ("round", "client", "stage", "step")] == [
                b[key] for key in ("round", "client", "stage", "step")
            ]
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5), layout
            for norm in ("gradient_norm", "update_norm"):
                assert b[norm] == pytest.approx(a[norm], rel=1e-3), (layout, norm)


def test_looking_changes_nothing_and_the_trace_is_one(dataset: Path, tmp_path: Path) -> None:
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    looks = {"debug__log_steps": True, "debug__profile_steps": [1, 3], "debug__deterministic": True}
    on_each(run_all, [(tree(dataset, plain, schedule__rounds=1),), (tree(dataset, seen, schedule__rounds=1, **looks),)])
    a, b = weights_of(plain, 0), weights_of(seen, 0)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    traces = sorted(path.name for path in (seen / "debug").glob("trace-*"))
    assert traces == ["trace-rank0-step1.json", "trace-rank0-step3.json"]
    events = json.loads((seen / "debug" / traces[0]).read_text())["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)
