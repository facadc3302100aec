"""Runs candidates in turn, each in a process of its own, and prints medians and their ratios.

A candidate is a command that prints a JSON object as its last line: of each figure a number, or a list of numbers where
it was measured several times. Rounds go A B, B A, A B, ... so that a machine that grows slower hits both alike; the
first round warms the page cache, or fills caches of the candidates' own, and does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, stolen
from benchmarks.machine import machine as machine
from flux_engine.bench.statistics import Spread

RESULTS = ROOT / "benchmarks" / "results"
LEAST = 1e-4
"""Of a figure of the baseline, for a ratio to say anything."""
Figures = dict[str, Any]
"""Name -> a number, or several."""


@dataclass(frozen=True)
class Candidate:
    """A command, and what is set in its environment alone."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    """Seconds after which it has failed."""


class Failed(RuntimeError):
    """A candidate that did not end as it should."""


def run_once(command: Sequence[str] | Candidate, environment: Mapping[str, str]) -> Figures:
    """Run a candidate; its figures, and `wall`, the seconds from before its start to after its end. Raises Failed."""
    one = command if isinstance(command, Candidate) else Candidate(command)
    began = time.perf_counter()
    try:
        done = subprocess.run(
            one.command,
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment, **one.environment},
            timeout=one.timeout,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(one.command)} did not end in {one.timeout:g} s") from None
    except OSError as error:
        raise Failed(f"{one.command[0]} cannot be started: {error}") from None
    wall = time.perf_counter() - began
    if done.returncode:
        raise Failed(f"{' '.join(one.command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    try:
        figures = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        figures = None
    if not isinstance(figures, dict):
        raise Failed(f"the last line of {' '.join(one.command)} is no JSON object: {done.stdout[-500:]!r}")
    return {"wall": wall, **figures}


def interleave(
    candidates: Mapping[str, Sequence[str] | Candidate],
    *,
    repeats: int,
    environment: Mapping[str, str] | None = None,
    first: dict[str, Figures] | None = None,
    failures: dict[str, str] | None = None,
) -> dict[str, list[Figures]]:
    """Every candidate `repeats` times, in turn.

    `first` is filled with the figures of the round that does not count. Without `failures` a candidate that fails ends
    it all with Failed; with it, what it said is put there, and the others go on without it.
    """
    runs: dict[str, list[Figures]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        order = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]
        for name in [each for each in order if each in runs]:
            try:
                figures = run_once(candidates[name], environment or {})
            except Failed as error:
                if failures is None:
                    raise
                failures[name] = str(error)
                del runs[name]
                sys.stderr.write(f"{name} failed: {str(error)[-300:]}\n")
                continue
            if turn > 0:
                runs[name].append(figures)
            elif first is not None:
                first[name] = figures
            sys.stderr.write(f"{'warm-up' if turn == 0 else turn} {name}: {figures['wall']:.2f} s\n")
    return runs


def spreads(runs: Sequence[Figures]) -> dict[str, Spread]:
    """Where every figure lies, over all runs and all times it was measured in each."""
    pooled: dict[str, list[float]] = {}
    for run in runs:
        for key, value in run.items():
            pooled.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return {key: Spread.of(values) for key, values in pooled.items() if values}


def medians(runs: Sequence[Figures]) -> dict[str, float]:
    """The median of every figure."""
    return {key: spread.median for key, spread in spreads(runs).items()}


def summary(benchmark: str, runs: Mapping[str, Sequence[Figures]], baseline: str) -> dict[str, Any]:
    """What a line of results holds. `ratio` divides by the baseline: below 1 is faster or smaller than it. `apart` is
    the distance between a figure's quarters, as a share of its median."""
    every = {name: spreads(each) for name, each in runs.items()}
    middle = {name: {key: one.median for key, one in each.items()} for name, each in every.items()}
    base = middle.get(baseline, {})
    return {
        "benchmark": benchmark,
        "baseline": baseline,
        "repeats": max(map(len, runs.values())),
        "median": {name: {k: round(v, 4) for k, v in each.items()} for name, each in middle.items()},
        "ratio": {
            name: {k: round(v / base[k], 4) for k, v in each.items() if base.get(k, 0) > LEAST}
            for name, each in middle.items()
            if name != baseline
        },
        "apart": {name: {k: round(one.relative, 4) for k, one in each.items()} for name, each in every.items()},
        "machine": machine(),
    }


def table(line: Mapping[str, Any]) -> str:
    """A line of results for people: a figure a row, or where there are many candidates, one of these a row."""
    middle, ratios = line["median"], line["ratio"]
    keys = list(dict.fromkeys(key for figures in middle.values() for key in figures))
    nan = float("nan")
    if len(middle) > 3:
        wide = max(map(len, middle)) + 2
        out = [" " * wide + "".join(f"{key:>{max(12, len(key) + 2)}}" for key in keys) + f"{'step ratio':>12}"]
        for name, figures in middle.items():
            cells = "".join(f"{figures.get(key, nan):{max(12, len(key) + 2)}.4g}" for key in keys)
            out.append(
                f"{name:{wide}}{cells}{ratios.get(name, {}).get('step', 1.0 if name not in ratios else nan):12.3f}"
            )
        return "\n".join(out)
    width = max(14, *(len(name) + 2 for name in middle))
    out = [f"{'':20}" + "".join(f"{name:>{width}}" for name in middle) + f"{'ratio':>10}"]
    for key in keys:
        cells = "".join(f"{figures.get(key, nan):{width}.3f}" for figures in middle.values())
        ratio = "".join(f"{each.get(key, nan):10.2f}" for each in ratios.values())
        out.append(f"{key:20}{cells}{ratio}")
    return "\n".join(out)


def report(benchmark: str, runs: Mapping[str, Sequence[Figures]], baseline: str) -> dict[str, Any]:
    """Print a table of medians, then one JSON line; returns what the line holds."""
    line = summary(benchmark, runs, baseline)
    sys.stdout.write(table(line) + "\n" + json.dumps(line) + "\n")
    return line


def save(line: Mapping[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Add a line to the results of this name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


def load() -> dict[str, float]:
    """What else the machine does: to be told beside figures, before and after them."""
    return {"load_average": round(os.getloadavg()[0], 2), "stolen": round(stolen(), 2)}
