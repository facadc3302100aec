"""A FLUX.1 schnell of full size with random weights: quantized while loading, and loaded as it was saved in 8 bits.

python -m benchmarks.full_size --folder F [--scheme int8] [--blocks 19 38] [--memory 12GB] [--keep]

Writes the model as a diffusers folder (34 GB, streamed), loads it and walks one step at 256 px; then saves it in 8 bits
(17 GB) and loads that, with all the memory there is ("auto") and with less. For each: seconds, bytes read, peak of
resident memory over that of the process before. The numbers are random, of the size that trained ones have, so the
picture shows nothing; it has to be the same each time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import machine
from benchmarks.planned import family_of
from flux_engine.checkpoints import export
from flux_engine.memory import Residents
from flux_engine.specs import FLUX_SCHNELL, FluxSpec

BLOCK = 2**22
"""Random numbers that are made, and written again and again."""

LOAD = """
import hashlib, json, sys, time
from pathlib import Path
import torch
torch.ones(8, 8) @ torch.ones(8, 8)
import flux_engine
from flux_engine import engine

def status(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

def read():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, had = status("VmHWM:"), read()
began = time.perf_counter()
loaded = flux_engine.load(sys.argv[1], quantization=sys.argv[2], dtype="bfloat16", memory=sys.argv[3])
took, peak, got = time.perf_counter() - began, status("VmHWM:") - before, read() - had
size = sum(part["bytes"] for part in loaded.describe()["parts"].values())
began = time.perf_counter()
made = loaded("a red star", width=256, height=256, num_inference_steps=1, seed=0, output_type="pt").images[0]
step = time.perf_counter() - began
print(json.dumps({"load": took, "read": got, "load peak": peak, "bytes": size, "step": step,
                  "peak": status("VmHWM:") - before, "finite": bool(made.isfinite().all()),
                  "picture": hashlib.sha256(made.numpy().tobytes()).hexdigest()}))
"""

SAVE = """
import sys
import flux_engine
flux_engine.quantize(sys.argv[1], sys.argv[3], scheme=sys.argv[2])
"""


def write(folder: Path, spec: FluxSpec) -> int:
    """The model as a folder; returns its bytes."""
    family = family_of(spec, "bfloat16", "none", Residents())
    with mock.patch.object(export, "_write_tensors", _stream):
        family.export(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _stream(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of bfloat16, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            if tensor.ndim == 1:  # scales of norms, and biases
                numbers = torch.zeros(1) if name.endswith("bias") else torch.ones(1)
                numbers = numbers.expand(min(BLOCK, tensor.numel()))
            else:
                numbers = block / math.sqrt(tensor[0].numel())
            raw = numbers.bfloat16().contiguous().view(torch.uint8).numpy().tobytes()
            left = 2 * tensor.numel()
            while left:
                left -= file.write(raw[:left])


def run(program: str, *arguments: str) -> tuple[float, dict[str, Any]]:
    """In a process of its own: seconds, and what its last line says."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def measure(folder: Path, scheme: str, spec: FluxSpec, memory: str) -> dict[str, Any]:
    """Write, load, save, load again, and with less memory. What is in `folder` afterwards: "source" and "saved"."""
    source, saved = folder / "source", folder / "saved"
    size = write(source, spec)
    _, first = run(LOAD, str(source), scheme, "auto")
    seconds, _ = run(SAVE, str(source), scheme, str(saved))
    found = {"on the fly": first} | {name: run(LOAD, str(saved), scheme, name)[1] for name in ("auto", memory)}
    if len({one["picture"] for one in found.values()}) > 1:
        raise AssertionError("not all of them draw the same picture")
    return {"source": size, "saving": seconds, "loads": found}


def main() -> None:
    """Measure, print; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new one, with room for 51 GB")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    parser.add_argument("--memory", default="12GB", help="less than all takes, for the last load")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    args = parser.parse_args()
    double, single = args.blocks
    params = replace(FLUX_SCHNELL.transformer, depth=double, depth_single_blocks=single)
    args.folder.mkdir(parents=True)
    try:
        found = measure(args.folder, args.scheme, replace(FLUX_SCHNELL, transformer=params), args.memory)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)
    sys.stdout.write(f"source {found['source'] / 1e9:.1f} GB, saved in {found['saving']:.0f} s\n")
    for name, one in found["loads"].items():
        sys.stdout.write(
            f"{name:10}  loaded in {one['load']:6.1f} s, read {one['read'] / 1e9:5.1f} GB, "
            f"network and encoders {one['bytes'] / 1e9:.2f} GB, peak {one['load peak'] / 1e9:.2f} GB; "
            f"a step at 256 px {one['step']:.1f} s, peak {one['peak'] / 1e9:.2f} GB\n"
        )
    sys.stdout.write(json.dumps({"scheme": args.scheme, "blocks": args.blocks, "machine": machine(), **found}) + "\n")


if __name__ == "__main__":
    main()
