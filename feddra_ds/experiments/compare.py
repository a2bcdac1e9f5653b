"""Rows → tables: the mean of each arm over its seeds, and how it differs from a baseline, seed by seed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from feddra_ds.experiments.rows import Row, latest
from feddra_ds.metrics.intervals import Mean, holm, t_interval


@dataclass(frozen=True)
class Cell:
    """An arm and a metric. values: by seed. difference: to the baseline over the seeds that both have; adjusted_p: its
    p-value, Holm-corrected over the arms of the table."""

    values: dict[int, float]
    mean: Mean
    difference: Mean | None = None
    adjusted_p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """cells: (arm, metric) → Cell, for every pair that has a value. baseline: arm → what it is compared to. crashed: arm →
    seeds without a result."""

    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    baseline: dict[str, str]
    kind: str
    cells: dict[tuple[str, str], Cell]
    crashed: dict[str, list[int]]


def choose_rows(rows: Sequence[Row], kind: str | None, fingerprints: dict[str, str] | None = None) -> list[Row]:
    """The latest row of each run of one kind of seeds, which are never mixed: `kind`, or test where there are test rows.

    fingerprints: run id → fingerprint; runs that are not in it, or that it has with another fingerprint, are left out.
    """
    kept = latest(list(rows))
    if fingerprints is not None:
        kept = [row for row in kept if fingerprints.get(row["id"]) == row["fingerprint"]]
    kind = kind or ("test" if any(row["kind"] == "test" for row in kept) else "dev")
    return [row for row in kept if row["kind"] == kind]


def compare(
    rows: Sequence[Row], metrics: Sequence[str], baseline: str | Mapping[str, str] | None, order: Sequence[str] = ()
) -> Comparison:
    """Compare the arms of rows of one kind, in `order`, others as their first rows come.

    baseline: the arm that all others are compared to, or arm → its own; a pair of which no row is there yet is left out.
    Raises ValueError for a metric, or for one baseline of all, that no row has.
    """
    there = dict.fromkeys(row["arm"] for row in rows)
    arms = tuple(dict.fromkeys([*(arm for arm in order if arm in there), *there]))
    good = [row for row in rows if row["status"] == "ok"]
    known = sorted({name for row in good for name in row["metrics"]})
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"metrics: no row has {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    if isinstance(baseline, str) and baseline not in arms:
        raise ValueError(f"baseline: no row is of arm {baseline}; there are: {', '.join(arms) or 'none'}")
    pairs = dict.fromkeys(arms, baseline) if isinstance(baseline, str) else dict(baseline or {})
    pairs = {arm: base for arm, base in pairs.items() if arm != base and {arm, base} <= there.keys()}
    cells: dict[tuple[str, str], Cell] = {}
    for metric in metrics:
        values = {arm: {row["seed"]: float(row["metrics"][metric]) for row in good if row["arm"] == arm
                        and metric in row["metrics"]} for arm in arms}  # fmt: skip
        cells |= {(arm, metric): cell for arm, cell in _column(values, pairs).items()}
    crashed = {arm: [row["seed"] for row in rows if row["arm"] == arm and row["status"] != "ok"] for arm in arms}
    kind = str(rows[0]["kind"]) if rows else ""
    return Comparison(arms, tuple(metrics), pairs, kind, cells, {arm: s for arm, s in crashed.items() if s})


def _column(values: dict[str, dict[int, float]], baseline: dict[str, str]) -> dict[str, Cell]:
    """The cells of one metric; arms without a value have none."""
    differences: dict[str, Mean] = {}
    for arm, base in baseline.items():
        paired = [value - values[base][seed] for seed, value in values[arm].items() if seed in values[base]]
        if paired:
            differences[arm] = t_interval(paired)
    tested = {arm: found.p_value for arm, found in differences.items() if found.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        arm: Cell(own, t_interval(list(own.values())), differences.get(arm), adjusted.get(arm))
        for arm, own in values.items()
        if own
    }


@dataclass(frozen=True)
class Table:
    """Rows of cells as text, the first of each its arm; what is between ** is bold."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def tables(found: Comparison) -> list[Table]:
    """The means, and the differences to the baseline where there is one."""
    seeds = sorted({seed for cell in found.cells.values() for seed in cell.values})
    head = ["arm", *(unit(metric) for metric in found.metrics)]
    cell = lambda arm, metric: found.cells.get((arm, metric))
    rows = [[arm, *(_mean(m, cell(arm, m), len(seeds)) for m in found.metrics)] for arm in found.arms]
    caption = f"Mean ± half of its 95 % interval over {len(seeds)} {found.kind} seeds ({_listed(seeds)})."
    out = [Table(caption, head, rows)]
    if others := [arm for arm in found.arms if arm in found.baseline]:
        bases = set(found.baseline.values())
        name = bases.pop() if len(bases) == 1 else "the arm's own control"
        rows = [[arm, *(_difference(m, cell(arm, m)) for m in found.metrics)] for arm in others]
        caption = (
            f"Difference to {name}, seed by seed, with its 95 % interval; p by Holm over the "
            f"{len(others)} comparisons of a column. Bold: the interval is off 0."
        )
        out.append(Table(caption, head, rows))
    return out


def crashed_in_words(found: Comparison) -> str:
    """Which runs crashed; empty where none did."""
    told = "; ".join(f"{arm} (seeds {_listed(seeds)})" for arm, seeds in found.crashed.items())
    return told and f"Crashed: {told}."


def markdown(found: Comparison) -> str:
    """The tables, and below them which runs crashed."""
    parts = []
    for table in tables(found):
        rule = ["---"] + ["---:"] * len(found.metrics)
        lines = [f"| {' | '.join(cells)} |" for cells in (table.head, rule, *table.rows)]
        parts.append("\n".join([table.caption, "", *lines]))
    return "\n\n".join([*parts, *filter(None, [crashed_in_words(found)])]) + "\n"


def as_csv(found: Comparison) -> str:
    """A line for every arm and metric, with the number of each seed."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(["arm", "metric", "kind", "n", "mean", "low", "high", "baseline", "difference", "difference_low",
           "difference_high", "p", "p_holm", "values"])  # fmt: skip
    for (arm, metric), cell in found.cells.items():
        m, d = cell.mean, cell.difference
        told = [d.mean, d.low, d.high, d.p_value, cell.adjusted_p] if d else [None] * 5
        values = " ".join(f"{seed}:{value:.6g}" for seed, value in sorted(cell.values.items()))
        write([arm, metric, found.kind, m.n, m.mean, m.low, m.high, found.baseline[arm] if d else None, *told, values])
    return out.getvalue()


def shown(metric: str, value: float, sign: bool = False) -> str:
    """Recalls and shares in %, losses and others as they are."""
    if "recall" in metric or "share" in metric:
        return f"{100 * value:{'+' if sign else ''}.1f}"
    return f"{value:{'+' if sign else ''}.3f}"


def unit(metric: str) -> str:
    """The metric's name with its unit."""
    return f"{metric}, %" if "recall" in metric or "share" in metric else metric


def _mean(metric: str, cell: Cell | None, num_seeds: int) -> str:
    if cell is None:
        return "–"
    of = cell.mean
    text = shown(metric, of.mean) + ("" if of.high is None else f" ± {shown(metric, of.high - of.mean)}")
    return text if of.n == num_seeds else f"{text} (n = {of.n})"


def _difference(metric: str, cell: Cell | None) -> str:
    of = cell.difference if cell is not None else None
    if cell is None or of is None:
        return "–"
    mean = shown(metric, of.mean, sign=True)
    if of.low is None or of.high is None:
        return f"{mean} (n = 1)"
    mean = f"**{mean}**" if of.low > 0 or of.high < 0 else mean
    p = cell.adjusted_p
    told = "" if p is None else f", p {p:.2g}" if p >= 0.001 else ", p < 0.001"
    return f"{mean} [{shown(metric, of.low, sign=True)}, {shown(metric, of.high, sign=True)}]{told}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
