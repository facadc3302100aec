"""Reading a checkpoint, in its own dtype and converted, against safetensors' load_file on a warm page cache.

    python -m benchmarks.load_weights [--gigabytes 2] [--repeats 7]

The file is float16 matrices; both read it as it is and then every page once, and read it anew as bfloat16. Converting
is told twice: against load_file and `.to(dtype)`, which is what people write, and against load_file alone, which maps
the file and converts nothing. `copied` is what an engine on a CPU does with a file in its own dtype: memory of its own,
against load_file and `.clone()`. `peak MB` is the resident peak of the process, with what was imported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

WIDTH = 4096

COMMON = """
import json, sys, time
from pathlib import Path
import torch
def timed(read):
    began = time.perf_counter(); tensors = read(); opened = time.perf_counter() - began
    for tensor in tensors.values():
        tensor.view(torch.int16)[:, ::1024].max()
    return opened, time.perf_counter() - began
def finish(read, copy, convert, alone):
    opened, touched = timed(read)
    _, copied = timed(copy)
    _, converted = timed(convert)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    told = {"opened": opened, "read": touched, "copied": copied, "converted": converted}
    print(json.dumps({**told, "conv. / read alone": touched if alone else converted, "peak MB": peak}))
"""
OURS = (
    COMMON
    + """
from flux_engine.checkpoints.source import WeightSource
def read(dtype=None, own=False):
    with WeightSource.open(Path(sys.argv[1])) as source:
        return {name: source.rows(name, dtype=dtype, own=own) for name in source.recipes}
finish(read, lambda: read(own=True), lambda: read(torch.bfloat16), False)
"""
)
THEIRS = (
    COMMON
    + """
from safetensors.torch import load_file
def convert():
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(sys.argv[1]).items()}
def copy():
    return {name: tensor.clone() for name, tensor in load_file(sys.argv[1]).items()}
finish(lambda: load_file(sys.argv[1]), copy, convert, True)
"""
)


def main() -> None:
    """Write the file, run both in turn, print the table and the JSON line."""
    import torch
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    count = max(1, round(args.gigabytes * 1e9 / (2 * WIDTH**2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({f"{i}.weight": torch.full((WIDTH, WIDTH), i, dtype=torch.float16) for i in range(count)}, path)
        runs = harness.interleave(
            {
                "flux-engine": [sys.executable, "-c", OURS, str(path)],
                "load_file": [sys.executable, "-c", THEIRS, str(path)],
            },
            repeats=args.repeats,
        )
    harness.report("load_weights", runs, "load_file")


if __name__ == "__main__":
    main()
