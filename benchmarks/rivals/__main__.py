"""Compare engines on one case, each in a process and an environment of its own.

    python -m benchmarks.rivals flux-1+2 [--engines ours-int8 diffusers openvino-int8] [--rounds 3] [--walks 2]

The first round begins with empty caches: its `first` is what a new user waits for, conversion and compilation counted,
and is kept apart as "cold first". The rounds after it begin with what the engine saved. An engine that cannot be
installed or fails is told, and the others go on. Adds a line to results/rivals.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Candidate, Failed
from benchmarks.machine import ROOT
from benchmarks.rivals import cases
from benchmarks.rivals.engines import BASELINE, DEFAULT, ENGINES, Engine
from benchmarks.rivals.environments import python_of

WORK = ROOT / "out" / "rivals"
LEAST_CONTROL = 0.01
"""What taking the text away has to change, for errors to mean anything."""


def candidate(name: str, engine: Engine, place: Path, folder: Path, *, walks: int, threads: int, timeout: float) -> Any:
    """The command of an engine. Raises Failed where its environment cannot be made."""
    command = [
        python_of(engine.environment), "-m", "benchmarks.rivals.worker", engine.runner, str(place),
        str(outputs_of(folder, name)), "--cache", str(folder / name), "--walks", str(walks), "--threads", str(threads),
        "--options", *engine.options,
    ]  # fmt: skip
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **engine.variables}
    return Candidate(command, variables, timeout)


def outputs_of(folder: Path, name: str) -> Path:
    """Where an engine writes what it made."""
    return folder / f"{name}.safetensors"


def compare(case: cases.Case, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run them; what a line of results holds. Raises Failed if none ran."""
    sys.stderr.write(f"weights, noise and reference of {case.name}\n")
    place = cases.make(case, WORK / "cases")
    control = json.loads((place / cases.CASE).read_text())["control"]
    if control < LEAST_CONTROL:
        raise Failed(f"without its text {case.name} changes by {control:.4f} only: errors would say nothing")
    folder = WORK / "caches" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    failures: dict[str, str] = {}
    candidates: dict[str, Candidate] = {}
    for name in names:
        try:
            candidates[name] = candidate(
                name, ENGINES[name], place, folder, walks=args.walks, threads=args.threads, timeout=args.timeout
            )
        except Failed as error:
            failures[name] = str(error)
            sys.stderr.write(f"{name} left out: {error}\n")
    first: dict[str, Any] = {}
    before = harness.load()
    try:
        runs = harness.interleave(candidates, repeats=args.rounds, first=first, failures=failures)
        if not runs:
            raise Failed(f"no engine ran: {failures}")
        for name, each in runs.items():
            wrong = cases.errors(place, outputs_of(folder, name))
            for figures in each:
                figures |= {**wrong, "cold first": first[name]["first"], "cold peak MB": first[name]["peak MB"]}
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    baseline = args.baseline if args.baseline in runs else next(iter(runs))
    line = harness.summary(f"rivals {case.name}", runs, baseline)
    more = {"control": control, "threads": args.threads, "load": {"before": before, "after": harness.load()}}
    return line | more | {"failures": {name: text[-500:] for name, text in failures.items()}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help=", ".join(cases.CASES))
    parser.add_argument("--engines", nargs="+", metavar="NAME", help=", ".join(ENGINES))
    parser.add_argument("--baseline", default=BASELINE, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="that count, beside the first, cold one")
    parser.add_argument("--walks", type=int, default=2, help="of four steps, in every round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="for one round of one engine")
    parser.add_argument("--keep", action="store_true", help="leave what the engines converted and wrote")
    parser.add_argument("--no-save", action="store_true", help="do not add to the results")
    args = parser.parse_args()
    if args.case not in cases.CASES:
        parser.error(f"no case {args.case!r}: {', '.join(cases.CASES)}")
    case = cases.CASES[args.case]
    names = args.engines or [name for name in DEFAULT if case.kind in ENGINES[name].kinds]
    for name in names:
        if name not in ENGINES:
            parser.error(f"no engine {name!r}: {', '.join(ENGINES)}")
        if case.kind not in ENGINES[name].kinds:
            parser.error(f"{name} runs {', '.join(ENGINES[name].kinds)}, and {case.name} is {case.kind}")
    if min(args.rounds, args.walks, args.threads) < 1:
        parser.error("rounds, walks and threads are at least 1")
    try:
        line = compare(case, names, args)
    except Failed as error:
        sys.exit(str(error))
    sys.stdout.write(harness.table(line) + "\n")
    if not args.no_save:
        harness.save(line, "rivals")
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
