"""Where a run stands: a live display on a terminal, a line per stage in a pipe, and RUN/progress.json for `status`.

Only the coordinator's process shows anything. While a stage runs it sees the clients of its own slot; the other slots
train beside them, in step with it, and it hears of theirs where the stage is averaged. Rounds count from 0, as in
metrics.jsonl and checkpoints/; the number of this many follows: 2 (3/25).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from feddra_ds.common.logs import logger
from feddra_ds.common.text import duration
from feddra_ds.federation.protocol import ClientReport
from feddra_ds.federation.record import RoundRecord
from feddra_ds.federation.schedule import Stage
from feddra_ds.run.display import Display

FILE_NAME = "progress.json"
_WRITE_EVERY_S = 2.0
_PHASES = {
    "aggregate": "averaging",
    "evaluate": "evaluating",
    "checkpoint": "writing the checkpoint",
    "model": "writing the model",
}


@dataclass
class Standing:
    """Where the run stands now. Times are time.monotonic() seconds."""

    round_index: int = 0
    phase: str = "starting"  # stage1, stage2, or a key of _PHASES
    num_steps: int = 0
    step: int = 0  # steps done by the client that trains
    client: str | None = None
    client_number: int = 0  # from 1, among the slot's
    loss: float | None = None  # of the last step
    pairs: int = 0  # trained on in this stage by the slot
    stage_began: float = 0.0
    round_began: float = 0.0
    round_steps_done: int = 0
    round_seconds: list[float] = field(default_factory=list)  # of the rounds that this process has finished
    last_line: RoundRecord | None = None


class Progress:
    """Told by the round loop what happens; use it as a context around all rounds.

    clients: ids of this slot's clients in the order in which they train. steps_per_round: local steps of a client in a
    round. enabled: whether this process shows and writes anything (the coordinator's does).
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        strategy: str,
        clients: Sequence[str],
        num_rounds: int,
        steps_per_round: int,
        batch_size: int,
        num_slots: int = 1,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.run_dir, self.strategy, self.clients = run_dir, strategy, list(clients)
        self.num_rounds, self.steps_per_round = num_rounds, steps_per_round
        self.batch_size, self.num_slots = batch_size, num_slots
        self.enabled, self.clock = enabled, clock
        self.console = console or Console(stderr=True)
        self.stopped: str | None = None  # why the run ends before its last round, where it ends well
        self.now = Standing(stage_began=clock(), round_began=clock())
        self._began = clock()
        self._written = float("-inf")
        self.display = Display(self.console, self.render)
        self._process_began = psutil.Process().create_time()

    # ---- the run's beginning and end
    def __enter__(self) -> Progress:
        if self.enabled:
            self.display.start()
            self._write("running", force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        self.display.stop()
        if error is None and self.stopped:
            self._write("stopped", reason=self.stopped, force=True)
        elif error is None:
            self._write("finished", force=True)
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._write("stopped", reason="stopped by a signal", force=True)
        else:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._write("failed", reason=first, force=True)

    # ---- what happens
    def begin_round(self, round_index: int) -> None:
        self.now.round_index, self.now.round_steps_done = round_index, 0
        self.now.round_began = self.clock()

    def begin_stage(self, stage: Stage) -> None:
        now = self.now
        now.phase, now.num_steps, now.pairs = stage.name, stage.num_steps, 0
        now.client, now.client_number, now.step, now.loss = None, 0, 0, None
        now.stage_began = self.clock()

    def begin_client(self, client_id: str) -> Callable[[int, float], None]:
        """Returns what LocalTrainer.run_stage calls after each step."""
        now = self.now
        now.client, now.client_number, now.step, now.loss = client_id, now.client_number + 1, 0, None

        def on_step(step: int, loss: float) -> None:
            now.step, now.loss = step + 1, loss
            now.pairs += self.batch_size
            now.round_steps_done += 1
            self._write("running")

        return on_step

    def end_stage(self, stage: Stage, clients: Mapping[str, ClientReport], *, slot_only: bool = False) -> None:
        """One line says how the stage went. clients: their reports, of every slot that was heard, which
        is where the stage is averaged; slot_only: of this slot's alone."""
        seconds = max(1e-9, self.clock() - self.now.stage_began)
        pairs = sum(told.pairs for told in clients.values())
        good = {client: told.train_loss for client, told in clients.items() if told.train_loss is not None}
        losses = "no finite loss"
        if good:
            worst = max(good, key=lambda client: good[client])
            losses = f"loss {sum(good.values()) / len(good):.4f}, worst {good[worst]:.4f} ({worst})"
        who = f"{len(clients)} clients" if len(clients) != 1 else next(iter(clients))
        whose = " of this slot" if slot_only and self.num_slots > 1 else ""
        self._say(
            f"{self._round()} {stage.name}: {who}{whose} × {stage.num_steps} steps, {losses}, "
            f"{pairs / seconds:.0f} pairs/s, {duration(seconds)}"
        )

    def enter(self, phase: str) -> None:
        """The round goes on with another phase: aggregate, evaluate, checkpoint or model."""
        if phase in _PHASES:
            self.now.phase, self.now.client = phase, None
            self._write("running")

    def end_round(self, line: RoundRecord) -> None:
        """`line`: the round's line of metrics.jsonl."""
        now = self.now
        now.last_line = line
        now.round_seconds.append(self.clock() - now.round_began)
        left = self.seconds_left()
        rest = f"; about {duration(left)} left" if left else ""
        self._say(f"{self._round()}: {summary(line)}, {duration(now.round_seconds[-1])}{rest}")
        self._write("running", force=True)

    # ---- how long it will take
    def seconds_left(self) -> float | None:
        """Estimate from the last three rounds, or within the first from its steps; None while there is nothing to go by."""
        now = self.now
        elapsed = self.clock() - now.round_began
        done = now.last_line is not None and now.last_line.get("round") == now.round_index
        if now.round_seconds:
            recent = now.round_seconds[-3:]
            each = sum(recent) / len(recent)
        else:
            total = self.steps_per_round * len(self.clients)
            if now.round_steps_done < max(2, 0.05 * total):
                return None
            each = elapsed * total / now.round_steps_done
        rounds_after = self.num_rounds - now.round_index - 1
        return each * rounds_after + (0.0 if done else max(0.0, each - elapsed))

    # ---- showing
    def _say(self, text: str) -> None:
        if self.enabled:
            logger.info("%s", text)

    def _round(self) -> str:
        return f"round {self.now.round_index} ({self.now.round_index + 1}/{self.num_rounds})"

    def render(self) -> RenderableType:
        """The live display: what runs, the client's steps, the run. Fits any width; long names are cut."""
        now = self.now
        head = Text(f"{self.strategy} · {self._round()} · ", no_wrap=True, overflow="ellipsis")
        if now.phase in _PHASES or now.client is None:
            head.append(_PHASES.get(now.phase, now.phase))
        else:
            head.append(f"{now.phase} · ")
            head.append(now.client, style="bold")
            head.append(f" ({now.client_number}/{len(self.clients)}{' of this slot' if self.num_slots > 1 else ''})")
        cells: list[tuple[str, float, str]] = []
        if now.client is not None:
            seconds = max(1e-9, self.clock() - now.stage_began)
            loss = "" if now.loss is None else f"loss {now.loss:.4f} · {now.pairs / seconds:.0f} pairs/s"
            cells.append((f"step {now.step}/{now.num_steps}", now.step / max(1, now.num_steps), loss))
        left, done = self.seconds_left(), self.fraction_done()
        times = f"{duration(self.clock() - self._began)} gone"
        cells.append((f"run {done:.0%}", done, times + (f" · about {duration(left)} left" if left is not None else "")))
        room = self.console.width - max(len(c[0]) for c in cells) - max(len(c[2]) for c in cells) - 4
        rows = Table.grid(padding=(0, 1))
        for _ in range(3):
            rows.add_column(no_wrap=True, overflow="ellipsis")
        for what, part, detail in cells:
            rows.add_row(what, ProgressBar(total=1.0, completed=part, width=max(4, min(40, room))), detail)
        lines: list[RenderableType] = [head, rows]
        if now.last_line is not None:
            lines.append(Text(f"last round: {summary(now.last_line)}", style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def fraction_done(self) -> float:
        """Share of the run's local steps that are done."""
        now = self.now
        per_round = max(1, self.steps_per_round * len(self.clients))
        done = now.last_line is not None and now.last_line.get("round") == now.round_index
        part = 1.0 if done else min(1.0, now.round_steps_done / per_round)
        return min(1.0, (now.round_index + part) / self.num_rounds)

    def _write(self, state: str, reason: str | None = None, force: bool = False) -> None:
        moment = self.clock()
        if not self.enabled or (not force and moment - self._written < _WRITE_EVERY_S):
            return
        self._written = moment
        now = self.now
        content = {
            "state": state,
            "reason": reason,
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_began": self._process_began,
            "round": now.round_index,
            "rounds": self.num_rounds,
            "phase": now.phase,
            "client": now.client,
            "client_number": now.client_number,
            "num_clients": len(self.clients),
            "step": now.step,
            "num_steps": now.num_steps,
            "loss": now.loss if now.loss is not None and now.loss == now.loss else None,
            "pairs_per_second": round(now.pairs / max(1e-9, moment - now.stage_began), 1),
            "fraction_done": round(self.fraction_done(), 4),
            "seconds_left": self.seconds_left(),
        }
        path = self.run_dir / FILE_NAME
        aside = path.with_name(f".{FILE_NAME}.partial")
        try:  # no fsync: losing the newest of these costs nothing, and no training run ends for want of one
            aside.write_text(json.dumps(content), encoding="utf-8")
            os.replace(aside, path)
        except OSError as error:
            logger.debug("%s cannot be written: %s", path, error)


def summary(line: RoundRecord) -> str:
    """Losses, weights and pooled retrieval of a round's line of metrics.jsonl, in one line of text."""
    ids, losses = line["client_ids"], line["client_losses"]
    known = {client: loss for client, loss in zip(ids, losses, strict=True) if loss is not None}
    if not known:
        return "no client was evaluated"
    worst = max(known, key=lambda client: known[client])
    out = f"loss {line['mean_loss']:.4f}"
    if len(ids) > 1:
        p = line.get("next_client_weights") or line["client_weights"]
        heaviest = max(range(len(ids)), key=lambda i: p[i])
        out += f", worst {known[worst]:.4f} ({worst}), p {min(p):.3f} to {max(p):.3f} ({ids[heaviest]})"
        gain = line.get("robust_gain")
        if gain and gain["share"] is not None:
            out += f", {100 * gain['share']:.0f} % of the robust gain"
    pooled = (line.get("val") or {}).get("all") or {}
    if "i2t_recall@5" in pooled:
        recall = (pooled["i2t_recall@5"] + pooled["t2i_recall@5"]) / 2
        out += f", recall@5 {recall:.3f} (chance {pooled['chance@5']:.3f})"
    return out
