"""Seconds and bytes, on a CPU and on a card."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Marks:
    """Points in time. On a card they are events in its queue, so marking waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, or on a card when it has come here."""
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next one; waits for the card."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def repeated(call: Callable[[], object], device: torch.device, *, warm_up: int = 1, repeats: int = 3) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm_up` more that do not count."""
    for _ in range(warm_up):
        call()
    marks = Marks(device)
    marks.mark()
    for _ in range(repeats):
        call()
        marks.mark()
    return marks.seconds()


def begin_peak(device: torch.device) -> None:
    """Count the most memory from now on, where the system lets a process say so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR.write_text("5")
    except OSError:  # then it is the peak since the process began
        return


def peak(device: torch.device) -> int:
    """Most bytes since `begin_peak`: of a card what torch took there, of a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return 1024 * int(STATUS.read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
