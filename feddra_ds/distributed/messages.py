"""Messages between ranks: small JSON values by key in the store that rank 0 serves, read by any number of ranks."""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

from feddra_ds.common.errors import WaitTimeout

_LONGEST_NAP_S = 0.25  # between two looks at the store


class Messages:
    """What one rank tells the others and hears from them; every wait is bounded by timeout_s, in seconds."""

    def __init__(self, store: dist.Store, rank: int, timeout_s: float):
        self._messages, self.rank, self.timeout_s = store, rank, timeout_s

    def post(self, key: str, value: Any) -> None:
        """Publish a JSON value under a key."""
        self._messages.set(key, json.dumps(value))

    def fetch(self, key: str, *, sender: str, timeout_s: float | None = None) -> Any:
        """Wait for a key and return its value. Raises WaitTimeout, naming `sender`, after timeout_s seconds."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        began = time.monotonic()
        try:
            while not self._messages.check([key]):
                waited = time.monotonic() - began
                if waited >= limit:
                    raise WaitTimeout(
                        f"rank {self.rank} waited {limit:.0f} s for {key} from {sender}; is it still running? "
                        "(clients.timeout_s bounds this wait)"
                    )
                time.sleep(
                    min(_LONGEST_NAP_S, 0.001 + 0.02 * waited)
                )  # short naps, so that Ctrl-C and SIGTERM are heard
            return json.loads(self._messages.get(key))
        except dist.DistNetworkError as error:
            raise WaitTimeout(
                f"rank {self.rank} lost the coordinator (rank 0) while it waited for {key}: {error}"
            ) from None

    def forget(self, key: str) -> None:
        """Delete a message that every reader has read."""
        self._messages.delete_key(key)
