"""The only timer: runs candidates in turn, each in a process of its own, and reports medians and their ratios.

A candidate is a command that prints a JSON object of numbers as its last line. Rounds go A B, B A, A B, ... so that a
machine that grows slower hits both alike; the first round warms the page cache and is dropped.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, float]


def run_once(command: Sequence[str], environment: Mapping[str, str]) -> Figures:
    """Run a candidate; its figures, and `wall`, the seconds from before its start to after its end."""
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {"wall": wall, **json.loads(done.stdout.splitlines()[-1])}


def interleave(
    candidates: Mapping[str, Sequence[str]], *, repeats: int, environment: Mapping[str, str] | None = None
) -> dict[str, list[Figures]]:
    """Every candidate `repeats` times, in turn."""
    runs: dict[str, list[Figures]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        order = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]
        for name in order:
            figures = run_once(candidates[name], environment or {})
            if turn > 0:
                runs[name].append(figures)
            sys.stderr.write(f"{'warm-up' if turn == 0 else turn} {name}: {figures['wall']:.2f} s\n")
    return runs


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of every figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def report(benchmark: str, runs: Mapping[str, Sequence[Figures]], baseline: str) -> dict[str, Any]:
    """Print a table of medians, then one JSON line; returns what the line holds.

    `ratio` divides by the baseline: below 1 is faster or smaller than it.
    """
    middle = {name: medians(each) for name, each in runs.items()}
    keys = list(middle[baseline])
    out = [f"{'':20}" + "".join(f"{name:>14}" for name in middle) + f"{'ratio':>10}"]
    ratios: dict[str, Figures] = {
        name: {key: value / middle[baseline][key] for key, value in figures.items() if middle[baseline][key]}
        for name, figures in middle.items()
        if name != baseline
    }
    for key in keys:
        cells = "".join(f"{figures.get(key, float('nan')):14.3f}" for figures in middle.values())
        ratio = "".join(f"{each.get(key, float('nan')):10.2f}" for each in ratios.values())
        out.append(f"{key:20}{cells}{ratio}")
    line = {
        "benchmark": benchmark,
        "baseline": baseline,
        "repeats": len(runs[baseline]),
        "median": {name: {k: round(v, 4) for k, v in each.items()} for name, each in middle.items()},
        "ratio": {name: {k: round(v, 4) for k, v in each.items()} for name, each in ratios.items()},
        "machine": machine(),
    }
    sys.stdout.write("\n".join(out) + "\n" + json.dumps(line) + "\n")
    return line


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    from flux_engine import hardware

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": hardware.describe(device),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
