"""What a command says, and how long its process has run."""

from __future__ import annotations

import os
import sys
import time

_IMPORTED = time.perf_counter()


def show(line: str) -> None:
    """Results go to standard output."""
    sys.stdout.write(line + "\n")


def tell(line: str) -> None:
    """Progress, notes and errors go to standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def since_process_start() -> float:
    """Seconds since this process began; since this module was imported, where the system does not tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _IMPORTED
