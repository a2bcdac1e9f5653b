"""Where torch builds DeepSpeed's C++ parts, and locks that killed builds left there, for which the next would wait for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

LONGEST_BUILD_S = 900.0


def stale_locks() -> list[Path]:
    """Locks of builds that are older than any build takes."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    now = time.time()
    return sorted(lock for lock in root.glob("**/lock") if now - lock.stat().st_mtime > LONGEST_BUILD_S)
