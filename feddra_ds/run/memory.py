"""What a rank takes of its device's memory, or its host's: at its peak, and in each stage."""

from __future__ import annotations

import resource

import psutil
import torch


class Memory:
    """Bytes of this rank: of the device where there is one, else resident on the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0  # the device's peak of the stages that have ended

    def begin_stage(self) -> None:
        if self.device.type == "cuda":
            self._before = self.peak
            torch.cuda.reset_peak_memory_stats(self.device)

    def of_stage(self) -> int:
        """Of the stage that ends: the device's peak since it began, else what is resident on the host."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return int(psutil.Process().memory_info().rss)

    @property
    def peak(self) -> int:
        """Of the run so far."""
        if self.device.type == "cuda":
            return max(self._before, int(torch.cuda.max_memory_allocated(self.device)))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
