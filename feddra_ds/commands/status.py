"""`feddra-ds status RUN`: where a run in the background stands, read from its files."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from rich.console import Console

from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.text import by_reason, duration, listed
from feddra_ds.run.files import RunFiles, open_run

GOOD_STATES = ("running", "starting", "finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `status`."""
    parser.add_argument("run_dir", metavar="RUN", help="the run's folder (its run.output_dir)")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="show it again every so many seconds until the run ends"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 where the run goes on or is finished, 1 where it stopped before its end."""
    if args.watch is not None and args.watch <= 0:
        raise ValueError(f"--watch: must be more than 0 seconds, got {args.watch:g}")
    while True:
        files = open_run(args.run_dir)
        report = describe(files)
        if args.json:
            print(json.dumps(report))
        else:
            show(files, report)
        if args.watch is None or report["state"] not in ("running", "starting"):
            return 0 if report["state"] in GOOD_STATES else 1
        time.sleep(args.watch)
        if not args.json and Console().is_terminal:
            Console().clear()


def describe(files: RunFiles, now: float | None = None) -> dict[str, Any]:
    """The standing as a JSON-ready dict; times in seconds."""
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
        "mean_loss": last["mean_loss"] if last else None,
        "worst_loss": last["worst_loss"] if last else None,
        "excluded_clients": last["excluded_clients"] if last else [],
        "skipped_samples": skipped_total(files),
        "val": last.get("val") if last else None,
    }


def skipped_total(files: RunFiles) -> int:
    """Unreadable samples met in all rounds."""
    return sum(n for line in files.lines for counts in line["skipped_samples"].values() for n in counts.values())


def show(files: RunFiles, report: dict[str, Any]) -> None:
    """The standing as text."""
    print(f"{report['run']}: {report['strategy']}, {report['state']} ({report['reason']})")
    line = f"  round: {report['rounds_done']} of {report['rounds']} done"
    if report["now"]:
        line += f"; now {_now(report['now'])}"
    print(line)
    times = f"  last sign of life: {duration(report['last_sign_seconds_ago'])} ago"
    if report["seconds_per_round"]:
        times += f"; {duration(report['seconds_per_round'])} a round"
    if report["seconds_left"] is not None:
        times += f"; about {duration(report['seconds_left'])} left"
    print(times)
    print(f"  last checkpoint: {report['checkpoint'] or 'none yet'}")
    if report["skipped_samples"]:
        print(f"  skipped: {report['skipped_samples']} samples could not be read (metrics.jsonl names the reasons)")
    for reason, clients in by_reason(report["excluded_clients"]).items():
        print(f"  excluded in the last round: {listed(clients)}: {reason}")
    if files.lines:
        print()
        _table(files, report)
        print()
    next_step(*_advice(files, report["state"]))


def _now(now: dict[str, Any]) -> str:
    text = f"round {now['round']}, {now['phase']}"
    if now["client"]:
        text += f", {now['client']}, step {now['step']}/{now['num_steps']}"
    return text + (f", loss {now['loss']:.4f}" if now["client"] and now["loss"] is not None else "")


def _table(files: RunFiles, report: dict[str, Any]) -> None:
    first, val = files.lines[0], report["val"] or {}
    rows: list[list[object]] = []
    for i, client in enumerate(files.client_ids):
        loss = report["client_losses"][i]
        rows.append(
            [
                client,
                f"{first['client_weights'][i]:.3f}",
                f"{report['client_weights'][i]:.3f}",
                _number(first["client_losses"][i]),
                _number(loss),
                *_recall(val.get(client)),
            ]
        )
    if len(files.client_ids) > 1:
        mean = _mean([val[client] for client in files.client_ids if client in val])
        rows.append(["mean", "", "", _number(first["mean_loss"]), _number(report["mean_loss"]), *_recall(mean)])
    if "all" in val:
        rows.append(["all, one gallery", "", "", "", "", *_recall(val["all"])])
    columns = ["client", "p first", "p next", "loss first", "loss last", "recall@5", "chance"]
    print_table(f"after round {files.rounds_done - 1}", columns, rows)


def _mean(galleries: list[dict[str, float]]) -> dict[str, float]:
    """Mean of recall@5 and chance@5 over the clients whose gallery is large enough; {} where none is."""
    keys = ("i2t_recall@5", "t2i_recall@5", "chance@5")
    known = [about for about in galleries if all(key in about for key in keys)]
    return {key: sum(about[key] for about in known) / len(known) for key in keys} if known else {}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _recall(val: dict[str, float] | None) -> tuple[str, str]:
    if not val or "i2t_recall@5" not in val:
        return "–", "–"
    return f"{(val['i2t_recall@5'] + val['t2i_recall@5']) / 2:.3f}", f"{val['chance@5']:.3f}"


def _advice(files: RunFiles, state: str) -> list[str]:
    report = f"feddra-ds report {files.path}"
    if state in ("running", "starting"):
        return [f"feddra-ds status {files.path} --watch 5", *([report] if files.lines else [])]
    if state == "finished":
        return [report, f"feddra-ds evaluate {files.path}"]
    how = "goes on from the last checkpoint" if files.checkpoints else "starts anew: there is no checkpoint yet"
    return [f"{files.resume_command()}   # {how}", *([report] if files.lines else [])]
