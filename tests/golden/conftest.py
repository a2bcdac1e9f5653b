"""The golden traces run on the ranks of the distributed tier, so its helpers must be importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
