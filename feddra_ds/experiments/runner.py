"""Runs an experiment: datasets once a seed, runs over worker processes, a row for each, resumable."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.common.files import write_atomic
from feddra_ds.common.tree import merge
from feddra_ds.data.progress import Track, untracked
from feddra_ds.experiments.grid import Grid, Run, fill
from feddra_ds.experiments.rows import ROWS_NAME, Row, RowsFile, latest
from feddra_ds.experiments.spec import ConvertData, DataSpec, Spec
from feddra_ds.experiments.worker import tidy


@dataclass(frozen=True)
class Options:
    """out: folder of rows, runs and data. workers: processes at a time. launch: a launcher's command, each run as a
    launch; None: in the worker. keep: checkpoints and models stay. again: test runs of changed arms are allowed. data, csv:
    a dataset, or a table for data.convert, in the place of the spec's."""

    out: Path
    workers: int
    launch: str | None = None
    keep: bool = False
    again: bool = False
    data: str | None = None
    csv: str | None = None

    @property
    def given(self) -> str | None:
        """The data of the command line, which its rows name."""
        return self.data or self.csv


@dataclass
class Progress:
    """Where an experiment stands: runs of this call that are done, of how many, and what is left of its time."""

    total: int
    workers: int
    began: float = field(default_factory=time.monotonic)
    done: int = 0

    def seconds_left(self) -> float | None:
        """By the mean so far; None before the first run has ended."""
        if not self.done:
            return None
        return (time.monotonic() - self.began) / self.done * (self.total - self.done)


def pending(grid: Grid, rows: list[Row], given: str | None = None) -> list[Run]:
    """The runs that no row of status ok answers. given: the data of the command line (Options.given)."""
    good = [row for row in latest(rows) if row["status"] == "ok" and row.get("data") == given]
    done = {(row["id"], row["fingerprint"]) for row in good}
    return [run for run in grid.runs if (run.id, run.fingerprint) not in done]


def check_test_rows(grid: Grid, rows: list[Row]) -> None:
    """Raises ConfigError where test seeds were looked at already with other arms than now."""
    was = {row["arms_fingerprint"] for row in rows if row["kind"] == "test"}
    if grid.runs and grid.runs[0].kind == "test" and was - {grid.fingerprint}:
        raise ConfigError(
            [
                "--seeds: test rows were written with other arms, base or data than the spec has now; what is changed after "
                "a look at test seeds is no test. Take new test seeds, or --again if nothing was chosen by them"
            ]
        )


def run_experiment(
    spec: Spec, grid: Grid, options: Options, told: Callable[[Row, Progress], None], track: Track = untracked
) -> list[Row]:
    """Do the runs that are not done yet; `told` hears of every row. Returns all rows of the file.

    Raises ConfigError, and DataError where a dataset cannot be made or another process works in the folder.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    with _locked(options.out / ".lock"):
        file = RowsFile(options.out / ROWS_NAME)
        if not options.again:
            check_test_rows(grid, file.rows)
        todo = _with_models(grid, pending(grid, file.rows, options.given), options)
        roots = {seed: _dataset(spec, seed, options, track) for seed in dict.fromkeys(run.seed for run in todo)}
        dealt = {
            seed: _shuffled(roots[seed], seed, options) for seed in dict.fromkeys(r.seed for r in todo if r.shuffled)
        }
        progress = Progress(len(todo), options.workers)
        data = {run.id: (dealt if run.shuffled else roots)[run.seed] for run in todo}
        for row in track(_rows(spec, grid, todo, data, options), len(todo), "runs"):
            progress.done += 1
            file.append(row)
            told(row, progress)
        if not options.keep:
            for run in grid.runs:
                tidy(_folder(options, run), "record")
        return file.rows


def _with_models(grid: Grid, todo: list[Run], options: Options) -> list[Run]:
    """The runs, and with them those that are done but whose model, which one of these reads, is gone."""
    read = {(name, run.seed) for run in todo for name in run.needs}
    gone = {
        run.id for run in grid.runs if (run.arm, run.seed) in read and not (_folder(options, run) / "model").is_dir()
    }
    ids = {run.id for run in todo} | gone
    return [run for run in grid.runs if run.id in ids]


class _locked:
    """A folder is worked in by one process at a time. Raises DataError where another is at it."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self.file = open(self.path, "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise DataError(f"--out: another `experiment run` works in {self.path.parent}; choose another") from None

    def __exit__(self, *_: object) -> None:
        self.file.close()


# --- data --------------------------------------------------------------------------------------------------------------


def _dataset(spec: Spec, seed: int, options: Options, track: Track) -> str:
    """The dataset of a seed, made where it is not there as the spec has it now."""
    source = DataSpec(path=options.data) if options.data else spec.data
    if source.path is not None:
        if not Path(source.path).is_dir():
            raise DataError(f"{'--data' if options.data else 'data.path'}: {source.path} is not a folder")
        return str(Path(source.path).resolve())
    out = options.out / "data" / f"seed-{seed}"
    recipe = json.dumps({"seed": seed, **source.model_dump(mode="json", exclude_none=True)}, sort_keys=True)
    note = out.with_name(f"{out.name}.json")
    if out.is_dir() and note.is_file() and note.read_text(encoding="utf-8") == recipe:
        return str(out.resolve())
    if note.exists():
        note.unlink()
    if source.synth is not None:
        from feddra_ds.data.synthetic.hospitals import synthesize

        synthesize(out, source.synth.options(seed, options.workers), track)
    else:
        assert source.convert is not None
        _convert(source.convert, Path(options.csv or source.convert.csv), out, seed, track)
    write_atomic(note, recipe)
    return str(out.resolve())


def _convert(asked: ConvertData, table: Path, out: Path, seed: int, track: Track) -> None:
    from feddra_ds.data.sources.base import Columns
    from feddra_ds.data.sources.ingest import IngestOptions, ingest
    from feddra_ds.data.sources.table import Table

    columns = Columns(
        image=asked.image_column,
        text=asked.text_column,
        client=asked.client_column,
        group=asked.group_column,
        site=asked.site_column,
        labels=tuple(asked.label_columns),
    )
    options = IngestOptions(
        val_fraction=asked.val_fraction,
        test_fraction=asked.test_fraction,
        image_size=asked.image_size,
        repeated_texts=asked.repeated_texts,
        seed=seed,
        overwrite=True,
        restart=True,
    )
    ingest(Table(table, columns), out, options, track)


def _shuffled(root: str, seed: int, options: Options) -> str:
    """The dataset of a seed's controls: that at `root`, each client's train texts dealt to its images at random."""
    from feddra_ds.data.sources.partition import PartitionOptions, partition

    out = options.out / "data" / f"seed-{seed}-shuffled"
    partition(Path(root), out, PartitionOptions(keep_clients=True, shuffle_texts=True, seed=seed, overwrite=True))
    return str(out.resolve())


# --- runs --------------------------------------------------------------------------------------------------------------


def _rows(spec: Spec, grid: Grid, todo: list[Run], data: dict[str, str], options: Options) -> Iterator[Row]:
    """A row for every run, as they end. data: run id → its dataset; workers are gone when this is left, however it is left."""
    queue_: _Ready = _Ready(todo)
    answers: queue.Queue[Row | BaseException | None] = queue.Queue()
    workers = [Worker(options.out) for _ in range(min(options.workers, len(todo)))]
    about = {"commit": _commit(), "experiment": spec.name, "arms_fingerprint": grid.fingerprint, "data": options.given}

    def serve(worker: Worker) -> None:
        try:
            while (run := queue_.take()) is not None:
                job = _job(spec, grid, run, data[run.id], options)
                answer = worker.do(job, spec.limit_s)
                queue_.done(run)
                answers.put(_row(run, answer, about))
        except BaseException as error:  # told to the main thread, which raises it
            answers.put(error)

    for worker in workers:
        threading.Thread(target=serve, args=(worker,), daemon=True).start()
    try:
        for _ in todo:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            assert answer is not None
            yield answer
    finally:
        queue_.close()
        for worker in workers:
            worker.close()


class _Ready:
    """Runs in order, each once what it reads is there."""

    def __init__(self, runs: list[Run]):
        self._left = list(runs)
        self._open = {(run.arm, run.seed) for run in runs}
        self._changed = threading.Condition()

    def take(self) -> Run | None:
        """The next run that can begin; waits for one; None when there are no more."""
        with self._changed:
            while self._left:
                for run in self._left:
                    if not any((name, run.seed) in self._open for name in run.needs):
                        self._left.remove(run)
                        return run
                self._changed.wait()
            return None

    def done(self, run: Run) -> None:
        with self._changed:
            self._open.discard((run.arm, run.seed))
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._left.clear()
            self._changed.notify_all()


class Worker:
    """A worker process, started when it is needed and started again when it has died."""

    def __init__(self, out: Path):
        self.out = out
        self.process: subprocess.Popen[bytes] | None = None

    def do(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The worker's answer; a crash of the process, or no answer in time, is one too."""
        began = time.monotonic()
        process = self.process = self.process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        reason = ""
        try:
            process.stdin.write((json.dumps(job) + "\n").encode())
            process.stdin.flush()
            if select.select([process.stdout], [], [], limit_s)[0]:
                if line := process.stdout.readline():
                    return dict(json.loads(line))
            else:
                reason = f"no end after limit_s = {limit_s:g} s"
        except BrokenPipeError:
            pass
        except ValueError as error:
            reason = f"the worker's answer is not JSON ({error})"
        status = process.poll() if reason else process.wait()
        reason = reason or f"the worker process ended with status {status} (a negative one is a signal)"
        self.close()
        return {"status": "crashed", "reason": reason, "seconds": round(time.monotonic() - began, 2)}

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        # a launch needs deepspeed's own command
        env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env.get("PATH", "")))
        code = "from feddra_ds.experiments.worker import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
        )

    def close(self) -> None:
        """End the process and what it has started."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _job(spec: Spec, grid: Grid, run: Run, root: str, options: Options) -> dict[str, Any]:
    folders = {other.arm: str(_folder(options, other)) for other in grid.runs if other.seed == run.seed}
    own: dict[str, Any] = {"run": {"output_dir": str(_folder(options, run)), "seed": run.seed}, "data": {"root": root}}
    keep = "all" if options.keep or run.arm in grid.needed else "record"
    return {
        "tree": merge(fill(run.tree, folders), own),
        "launch": options.launch,
        "evaluate": spec.evaluate.model_dump(mode="json"),
        "keep": keep,
    }


def _folder(options: Options, run: Run) -> Path:
    return (options.out / "runs" / run.id).resolve()


def _row(run: Run, answer: dict[str, Any], about: dict[str, Any]) -> Row:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "id": run.id,
        "arm": run.arm,
        "seed": run.seed,
        "kind": run.kind,
        "keys": run.keys,
        "fingerprint": run.fingerprint,
        **about,
        **answer,
        "date": now,
    }


def _commit() -> str | None:
    """Of the checkout that this code is in, with + where files have changed; None for an installed package."""
    root = Path(__file__).parents[2]
    if not shutil.which("git") or not (root / ".git").exists():
        return None
    ask = lambda *words: subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()
    return (ask("rev-parse", "--short=12", "HEAD") + ("+" if ask("status", "--porcelain") else "")) or None
