"""What the commands share: tables and progress bars for terminals and pipes alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track as rich_track
from rich.table import Table

from feddra_ds.common.text import printable

T = TypeVar("T")


def track(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal (stderr) and nothing in a pipe. total: None where it is not known."""
    console = Console(stderr=True)
    return iter(rich_track(items, what, total=total, console=console, transient=True, disable=not console.is_terminal))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], total: bool = False) -> None:
    """A table on stdout; the first column is text, the others are numbers. total: the last row is a sum."""
    table = Table(title=escape(printable(title)), title_justify="left", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(escape(printable(column)), justify="right" if number else "left", overflow="fold")
    body = [[_cell(value) for value in row] for row in rows]
    for number, row in enumerate(body):
        table.add_row(*map(escape, row), style="bold" if total and number == len(body) - 1 else None)
    console = Console()
    if not console.is_terminal:  # a pipe has no width, and rich would wrap at 80 columns
        console = Console(width=200)
    console.print(table)


def next_step(*lines: str) -> None:
    """How every command ends: what to do next."""
    print("Next:")
    for line in lines:
        print(f"  {line}")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))
