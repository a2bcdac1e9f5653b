"""Work on many items in threads, in their order: Pillow, hashing and reading of files release the interpreter's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_UNDER_WAY = 64


def in_threads(work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[tuple[_In, _Out]]:
    """(item, work(item)) in order, a bounded number under way. Raises what `work` raises, at its item."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[_In, Future[_Out]]] = deque()
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) >= _UNDER_WAY:
                item, future = ahead.popleft()
                yield item, future.result()
        while ahead:
            item, future = ahead.popleft()
            yield item, future.result()
