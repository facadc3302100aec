"""What loading in 8 bits takes, measured; and what the published models take on every card, counted dry.

python -m benchmarks.memory [--scheme int8] [--double 2] [--single 4] [--folder F] [--host-memory 48] [--only PART]

Loading: a FLUX.1 transformer of true width is read from a file in bfloat16, which is written first, with random
numbers, and deleted at the end. In between, in a process of its own, the peak of resident memory (VmHWM) is taken from
before the file is opened to when the network is there. The least there can be are the bytes of the network.
Cards: FLUX.1 dev and schnell and SDXL draw two pictures of 1024 px on tensors without numbers (planned.py), under the
plan for each card. "network" are the blocks without modulation; "leaves" is what waits on the host meanwhile,
"resident" the weights in the loop, "moved" what comes for a new prompt; "whole" is the loop with nothing leaving,
whatever the card has room for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import planned
from benchmarks.harness import machine
from flux_engine.models.flux import Flux
from flux_engine.params import FluxParams
from flux_engine.quantization.linears import SCHEMES
from flux_engine.specs import FLUX_DEV, FLUX_SCHNELL, SDXL

ALLOWED = 1.15, 300e6
"""Of the network's bytes, and beside them."""

CHILD = """
import json, sys
from pathlib import Path
import torch
from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.models.flux import Flux
from flux_engine.params import FluxParams
from flux_engine.quantization.policy import treatment

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

torch.ones(8, 8) @ torch.ones(8, 8)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
with WeightSource.open(Path(sys.argv[1])) as file:
    source = pick(file, "flux")
    params = FluxParams.from_shapes(source.shapes)
    net = load_module(lambda: Flux(params), source, dtype=torch.bfloat16, device=torch.device("cpu"),
                      treat=treatment("flux", sys.argv[2]))
print(json.dumps({"peak": peak() - before, "before": before, "bytes": sum(p.nbytes for p in net.parameters())}))
"""


def write_random(path: Path, params: FluxParams) -> int:
    """A checkpoint in bfloat16; returns its bytes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux(params).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=generator).bfloat16()
    tensors = {
        name: block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape).contiguous()
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return path.stat().st_size


def measure(path: Path, scheme: str) -> dict[str, float]:
    """In a process of its own: `peak`, `before` and the network's `bytes`."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), scheme], capture_output=True, text=True, check=False, timeout=1200
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def loading(folder: Path, scheme: str, params: FluxParams) -> dict[str, Any]:
    """Write a checkpoint, load it, delete it."""
    path = folder / "flux.safetensors"
    try:
        size = write_random(path, params)
        found = measure(path, scheme)
    finally:
        path.unlink(missing_ok=True)
    return found | {"source": size, "allowed": ALLOWED[0] * found["bytes"] + ALLOWED[1]}


def show_cards(host_memory: int) -> list[dict[str, Any]]:
    """Print a line for every model, card and precision."""
    sys.stdout.write(
        f"{'':13}{'':12}{'':6}{'network':>8}{'whole':>7}{'peak':>7}   {'resident':>8}{'foretold':>9}{'peak':>7}"
        f"{'foretold':>9}{'moved':>7}  leaves\n"
    )
    lines: list[dict[str, Any]] = []
    for one in planned.table([FLUX_DEV, FLUX_SCHNELL, SDXL], host_memory):
        lines.append(one)
        said = f"{one['model']:13}{one['card']:12}{one['scheme']:6}{one['network'] / 1e9:8.2f}"
        said += f"{one['whole'] / 1e9:7.2f}{one['whole peak'] / 1e9:7.2f}"
        if "refused" in one:
            sys.stdout.write(f"{said}   {one['refused']}\n")
            continue
        figures = (one["resident"], one["foretold"], one["peak"], one["foretold peak"], one["moved"])
        widths = (8, 9, 7, 9, 7)
        said += "   " + "".join(f"{figure / 1e9:{width}.2f}" for figure, width in zip(figures, widths, strict=True))
        sys.stdout.write(f"{said}  {', '.join(one['leaves']) or 'nothing'}\n")
    return lines


def main() -> None:
    """Measure, print; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="int8", choices=list(SCHEMES))
    parser.add_argument("--double", type=int, default=2, help="double blocks, of 19")
    parser.add_argument("--single", type=int, default=4, help="single blocks, of 38")
    parser.add_argument("--folder", type=Path, help="where there is room for the file; else the system's temporary one")
    parser.add_argument("--host-memory", type=float, default=48, metavar="GB", help="for what leaves a card")
    parser.add_argument("--only", choices=("loading", "cards"))
    args = parser.parse_args()
    line: dict[str, Any] = {"machine": machine()}
    if args.only != "cards":
        line |= show_loading(args)
    if args.only != "loading":
        line["cards"] = show_cards(int(args.host_memory * 1e9))
    sys.stdout.write(json.dumps(line) + "\n")


def show_loading(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = loading(Path(folder), args.scheme, FluxParams(depth=args.double, depth_single_blocks=args.single))
    sys.stdout.write(
        f"source {found['source'] / 1e6:,.0f} MB, network {found['bytes'] / 1e6:,.0f} MB, "
        f"peak {found['peak'] / 1e6:,.0f} MB over {found['before'] / 1e6:,.0f} MB: "
        f"{found['peak'] / found['bytes']:.3f} of the network, allowed {found['allowed'] / 1e6:,.0f} MB\n"
    )
    return {"scheme": args.scheme, "double": args.double, "single": args.single, **found}


if __name__ == "__main__":
    main()
