"""`flux-engine bench` with what is worth measuring here, each in a process of its own, kept as results.

    python -m benchmarks.presets [--preset auto] [--sweeps] [--folder benchmarks/results] [-- MORE OPTIONS]

`--sweeps` adds how the cost grows with batch, size and steps. Lines of the command's JSON go to bench.jsonl with the
machine and the commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, save
from benchmarks.machine import ROOT, machine

SWEPT = ("--synthetic", "flux", "--depth", "0+1", "--quantization", "auto")
"""What sweeps are of: enough to see how a cost grows, and little enough for a processor."""


def commands(preset: str, sweeps: bool, more: list[str]) -> list[list[str]]:
    """The command lines."""
    this = [sys.executable, "-m", "flux_engine.cli", "bench", "--json"]
    found = [[*this, "--preset", preset, *more]]
    if sweeps:
        found += [[*this, *SWEPT, "--sweep", "size", *more]]
        found += [[*this, *SWEPT, "--width", "256", "--height", "256", "--sweep", each, *more] for each in
                  ("batch", "steps")]  # fmt: skip
    return found


def main() -> None:
    """Command line. Ends with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--sweeps", action="store_true")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("more", nargs="*", help="for every command, as --repeats 5; after --")
    args = parser.parse_args()
    taken, failed = machine(), False
    for command in commands(args.preset, args.sweeps, args.more):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
        failed |= done.returncode != 0
        for text in done.stdout.splitlines():
            line = json.loads(text)
            save(line | {"machine": taken}, "bench", args.folder)
            step = line.get("seconds", {}).get("step", {}).get("median")
            told = line.get("refused") or (f"{step:.4f} s a step" if step else f"exponent {line.get('exponent'):.3f}")
            sys.stdout.write(f"{line['run']}, {line.get('quantization', line.get('sweep'))}: {told}\n")
            sys.stdout.flush()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
