"""What figures were taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """Device, processor, load, versions and commit."""
    import torch

    from flux_engine import hardware

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": hardware.describe(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "features": sorted(name for name in _features() if name.startswith(("avx512_", "amx_", "avx_vnni"))),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system() + " " + platform.release().partition("-")[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Of those that are installed."""
    found: dict[str, str] = {}
    for name in libraries:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of this checkout, "-dirty" behind it where files were changed; nothing where there is no git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
        )
    except OSError:
        return ""
    return done.stdout.strip()


def stolen() -> float:
    """Seconds that other guests took from this machine's processors since it began; 0 where the system does not
    tell."""
    try:
        return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _cpuinfo(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _features() -> list[str]:
    return _cpuinfo("flags").split()


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor()
