"""Where a run stands: what `feddra-ds status` shows."""

from __future__ import annotations

import time
from typing import Any

from feddra_ds.report.tables import skipped_rows, skipped_step_rows
from feddra_ds.run.files import RunFiles


def standing(files: RunFiles, now: float | None = None) -> dict[str, Any]:
    """The standing as a JSON-ready dict; times in seconds. now: Unix time, None for the clock's."""
    now = time.time() if now is None else now
    state, reason = files.state(now)
    last = files.lines[-1] if files.lines else None
    active = state == "running"
    checkpoints = files.checkpoints
    return {
        "run": str(files.path),
        "strategy": files.get("strategy.name"),
        "state": state,
        "reason": reason,
        "rounds_done": files.rounds_done,
        "rounds": files.num_rounds,
        "now": {k: files.progress.get(k) for k in ("round", "phase", "client", "step", "num_steps", "loss")}
        if active
        else None,
        "last_sign_seconds_ago": round(now - files.last_sign, 1),
        "seconds_per_round": files.seconds_per_round() or None,
        "seconds_left": files.seconds_left(now) if active else None,
        "checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "client_ids": files.client_ids,
        "client_weights": (last.get("next_client_weights") or last["client_weights"]) if last else None,
        "client_losses": last["client_losses"] if last else None,
        "client_losses_se": last.get("client_losses_se") if last else None,
        "client_train_losses": last.get("client_train_losses") if last else None,
        "robust_gain": last.get("robust_gain") if last else None,
        "mean_loss": last["mean_loss"] if last else None,
        "worst_loss": last["worst_loss"] if last else None,
        "excluded_clients": last["excluded_clients"] if last else [],
        "clipped_losses": (last.get("clipped_losses") or []) if last else [],
        "skipped_steps": sum(count for _, _, count in skipped_step_rows(files.lines)),
        "skipped_samples": sum(count for _, _, count in skipped_rows(files.lines)),
        "val": last.get("val") if last else None,
    }
