"""One engine in its own environment: from the start of this process to the first output, then walks of some steps.

    python -m benchmarks.rivals.worker RUNNER CASE-FOLDER OUTPUTS --cache FOLDER [--options A B] [--walks 3]

Imports nothing of this project but the runner, because a rival's environment has nothing of it. The last line it prints
is JSON: `first` seconds from the start of the process to the first output, whatever had to be converted or compiled for
it counted; `step`, `prompt` and `walk` in seconds (a prompt is what is done once for all steps of a walk, a walk is
both, divided by its steps); memory in MB.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Runner(Protocol):
    """A network that was read, ready to be called."""

    def prompt(self) -> None:
        """What is done once for a prompt and schedule."""

    def step(self, call: int) -> Any:
        """A call of the network, done when it returns: a torch tensor, in any dtype."""


def since_process_start() -> float:
    """Seconds."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory() -> float:
    """MB, of all of this process's life. Not by getrusage, whose figure begins with that of the process that started
    this one."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner")
    parser.add_argument("place", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--cache", type=Path, required=True, help="where what was converted or compiled may be kept")
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--walks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    case = json.loads((args.place / "case.json").read_text())
    module = importlib.import_module(f"benchmarks.rivals.runners.{args.runner}")
    runner: Runner = module.make(args.place, case, set(args.options), args.cache, args.threads)
    loaded = since_process_start()
    runner.prompt()
    outputs = {0: runner.step(0)}
    first = since_process_start()
    for call in case["compared"][1:]:
        outputs[call] = runner.step(call)
    _write(outputs, args.outputs)
    del outputs
    figures: dict[str, Any] = {"loaded": loaded, "first": first, "prompt": [], "step": [], "walk": []}
    for _ in range(args.walks):
        began = time.perf_counter()
        runner.prompt()
        figures["prompt"].append(time.perf_counter() - began)
        for call in range(case["calls"]):
            at = time.perf_counter()
            runner.step(call)
            figures["step"].append(time.perf_counter() - at)
        figures["walk"].append((time.perf_counter() - began) / case["calls"])
    figures["peak MB"] = peak_memory()
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


def _write(outputs: dict[int, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({str(call): tensor.float().contiguous() for call, tensor in outputs.items()}, path)


if __name__ == "__main__":
    main()
