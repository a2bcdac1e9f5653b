"""Messages between ranks: small JSON values by key in the store that rank 0 serves, read by any number of ranks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist

from feddra_ds.common.errors import WaitTimeout

T = TypeVar("T")
_LONGEST_NAP_S = 0.25  # between two looks at the store
_ANSWER_S = 5.0  # the least that a single look is given


class Messages:
    """What one rank tells the others and hears from them; every wait is bounded by timeout_s, in seconds."""

    def __init__(self, store: dist.Store, rank: int, timeout_s: float):
        self._messages, self.rank, self.timeout_s = store, rank, timeout_s

    def post(self, key: str, value: Any, *, timeout_s: float | None = None) -> None:
        """Publish a JSON value under a key. Raises WaitTimeout where the coordinator does not take it in time."""
        limit, said = self.timeout_s if timeout_s is None else timeout_s, json.dumps(value)
        self._ask(lambda: self._messages.set(key, said), f"while it told {key}", limit)

    def fetch(self, key: str, *, sender: str, timeout_s: float | None = None) -> Any:
        """Wait for a key and return its value. Raises WaitTimeout, naming `sender`, after timeout_s seconds."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        began = time.monotonic()
        waited = 0.0
        while not self._ask(lambda: self._messages.check([key]), f"while it waited for {key}", limit - waited):
            waited = time.monotonic() - began
            if waited >= limit:
                raise WaitTimeout(
                    f"rank {self.rank} waited {limit:.0f} s for {key} from {sender}; is it still running? "
                    "(clients.timeout_s bounds this wait)"
                )
            time.sleep(min(_LONGEST_NAP_S, 0.001 + 0.02 * waited))  # short naps, so that Ctrl-C and SIGTERM are heard
        return json.loads(self._ask(lambda: self._messages.get(key), f"while it waited for {key}", limit - waited))

    def _ask(self, call: Callable[[], T], what: str, limit: float) -> T:
        """A call of the store, of at most so many seconds, or 5. In C++ it would wait without bound, and deaf to signals, for
        a coordinator that is frozen or behind a cut cable, so it has a thread of its own. Raises WaitTimeout."""
        try:
            return _in_thread(call).result(max(_ANSWER_S, limit))
        except TimeoutError:
            raise WaitTimeout(
                f"rank {self.rank} had no answer from the coordinator (rank 0) for {max(_ANSWER_S, limit):.0f} s {what}: it "
                "is frozen, or the network between their hosts is cut (clients.timeout_s bounds this wait)"
            ) from None
        except dist.DistNetworkError as error:
            raise WaitTimeout(f"rank {self.rank} lost the coordinator (rank 0) {what}: {error}") from None

    def forget(self, key: str) -> None:
        """Delete a message that every reader has read."""
        self._messages.delete_key(key)


def _in_thread(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="a call of the store").start()
    return future
