"""What `status` prints; this file is not a command."""

from __future__ import annotations

from typing import Any

from feddra_ds.common.console import next_step, print_table
from feddra_ds.common.text import by_reason, decimals, duration, listed
from feddra_ds.report.tables import both_ways, clipped_in_words, gain_in_words, mean_gallery, mean_of
from feddra_ds.run.files import RunFiles


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
    if report["skipped_steps"]:
        print(
            f"  skipped: {report['skipped_steps']} local steps, whose gradients were not finite (the report names them)"
        )
    for item in report["clipped_losses"]:
        print(f"  not believed in the last round: {item['id']}, {clipped_in_words(item)}")
    for reason, clients in by_reason(report["excluded_clients"]).items():
        print(f"  excluded in the last round: {listed(clients)}: {reason}")
    if files.lines:
        print()
        _table(files, report)
        gain = gain_in_words(report["robust_gain"])
        if gain:
            print(gain)
        print()
    next_step(*_advice(files, report["state"]))


def _now(now: dict[str, Any]) -> str:
    text = f"round {now['round']}, {now['phase']}"
    if now["client"]:
        text += f", {now['client']}, step {now['step']}/{now['num_steps']}"
    return text + (f", loss {now['loss']:.4f}" if now["client"] and now["loss"] is not None else "")


def _table(files: RunFiles, report: dict[str, Any]) -> None:
    first, val = files.lines[0], report["val"] or {}
    errors, train = report["client_losses_se"], report["client_train_losses"]
    also = lambda cell: [cell] if train else []  # an older run has no training losses
    rows: list[list[object]] = []
    for i, client in enumerate(files.client_ids):
        loss = decimals(report["client_losses"][i], 4)
        rows.append(
            [
                client,
                f"{first['client_weights'][i]:.3f}",
                f"{report['client_weights'][i]:.3f}",
                decimals(first["client_losses"][i], 4),
                f"{loss} ± {errors[i]:.4f}" if errors and errors[i] is not None else loss,
                *also(decimals(train[i] if train else None, 4)),
                *_recall(val.get(client, {})),
            ]
        )
    if len(files.client_ids) > 1:
        mean = mean_gallery([val[client] for client in files.client_ids if client in val])
        losses = decimals(first["mean_loss"], 4), decimals(report["mean_loss"], 4)
        rows.append(["mean", "", "", *losses, *also(decimals(mean_of(train), 4)), *_recall(mean)])
    if "all" in val:
        rows.append(["all, one gallery", "", "", "", "", *also(""), *_recall(val["all"])])
    columns = ["client", "p first", "p next", "loss first", "loss last", *also("train loss"), "recall@5", "chance"]
    print_table(f"after round {files.rounds_done - 1}", columns, rows)


def _recall(val: dict[str, float]) -> tuple[str, str]:
    """Recall@5 of both ways and its chance, where the gallery is large enough."""
    return decimals(both_ways(val, 5), 3), decimals(val.get("chance@5"), 3)


def _advice(files: RunFiles, state: str) -> list[str]:
    report = f"feddra-ds report {files.path}"
    if state in ("running", "starting"):
        return [f"feddra-ds status {files.path} --watch 5", *([report] if files.lines else [])]
    if state == "finished":
        return [report, f"feddra-ds evaluate {files.path}"]
    how = "goes on from the last checkpoint" if files.checkpoints else "starts anew: there is no checkpoint yet"
    return [f"{files.resume_command()}   # {how}", *([report] if files.lines else [])]
