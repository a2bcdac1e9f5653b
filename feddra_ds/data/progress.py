"""How work that takes a while shows how far it is: through a callable that its caller hands in. Prints nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Passes the `total` items (None: so far nobody knows how many) on, one by one; `what` says what is being done.

    `common.console.track` draws a bar.
    """

    def __call__(self, items: Iterable[T], total: int | None, what: str) -> Iterator[T]: ...


def untracked(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Passes the items on and shows nothing."""
    return iter(items)
