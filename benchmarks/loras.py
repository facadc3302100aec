"""Switching LoRAs on a FLUX.1 transformer of true width, against diffusers.

python -m benchmarks.loras [--rank 16] [--double 2] [--single 4] [--repeats 3] [--schemes none int8 none-side]

The weights are random numbers, and there are two LoRAs on every linear of the blocks. One of them is merged; a switch
takes it out and merges the other: here `lora.set`, there unfuse, unload, load and fuse. `first` reads a LoRA's file for
the first time, `switch` is the median of those after it, when ours are prepared (diffusers unloads and reads them each
time, as it has to where many are served), `clear` gives the base back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness import interleave, report
from benchmarks.memory import write_random
from flux_engine.params import FluxParams

SWITCHES = 4


def write_lora(path: Path, params: FluxParams, rank: int, seed: int) -> None:
    """In bfloat16, under diffusers' names."""
    width, mlp = params.hidden_size, int(params.hidden_size * params.mlp_ratio)
    double = {
        "norm1.linear": (6 * width, width), "norm1_context.linear": (6 * width, width),
        **{f"attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                                                       "add_v_proj", "to_add_out")},
        **{f"{ff}.net.0.proj": (mlp, width) for ff in ("ff", "ff_context")},
        **{f"{ff}.net.2": (width, mlp) for ff in ("ff", "ff_context")},
    }  # fmt: skip
    single = {
        "norm.linear": (3 * width, width), "proj_mlp": (mlp, width), "proj_out": (width, width + mlp),
        **{f"attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")},
    }  # fmt: skip
    shapes = {f"transformer_blocks.{i}.{n}": s for i in range(params.depth) for n, s in double.items()}
    shapes |= {
        f"single_transformer_blocks.{i}.{n}": s for i in range(params.depth_single_blocks) for n, s in single.items()
    }
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (n, k) in shapes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator).bfloat16() * 0.01
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator).bfloat16() * 0.01
    save_file(tensors, path)


def timed(change: Callable[[str], object], clear: Callable[[], object], loras: list[str]) -> dict[str, float]:
    """Seconds of the first, of a switch, and of giving the base back."""
    took: list[float] = []
    for n in range(SWITCHES + 2):
        began = time.perf_counter()
        change(loras[n % 2])
        took.append(time.perf_counter() - began)
    began = time.perf_counter()
    clear()
    return {"first": took[0], "switch": statistics.median(took[2:]), "clear": time.perf_counter() - began}


def ours(model: str, loras: list[str], which: str) -> dict[str, float]:
    """The engine's way, without text encoders and autoencoder. `which` is a scheme, with "-side" for beside."""
    from flux_engine.families.flux import load_transformer, sized
    from flux_engine.lora.finding import Found, Named
    from flux_engine.lora.state import Loras, networks_of
    from flux_engine.memory import Place
    from flux_engine.specs import FLUX_SCHNELL

    def here(named: Named) -> Found:
        return Found(Path(named), str(named))

    spec = sized(FLUX_SCHNELL, Path(model))
    scheme, how = which.removesuffix("-side"), "side" if which.endswith("-side") else "merge"
    place = Place(torch.bfloat16, torch.device("cpu"), scheme)
    net, _ = load_transformer(spec, Path(model), place)
    networks = networks_of(spec, [("transformer", net)], place.residents.loaded)
    state = Loras(lambda: spec, networks, nullcontext, lambda parts: None, lambda mode: None, here)
    return timed(lambda path: state.set([path], how=how), state.clear, loras)


def theirs(model: str, loras: list[str]) -> dict[str, float]:
    """diffusers' way, on the same numbers."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    from flux_engine.checkpoints.keys import to_theirs
    from flux_engine.checkpoints.source import WeightSource
    from flux_engine.checkpoints.tables import FLUX_DIFFUSERS

    with WeightSource.open(Path(model)) as source:
        params = FluxParams.from_shapes(source.shapes)
        state = to_theirs(
            {name: source.rows(name) for name in source.recipes}, FLUX_DIFFUSERS, width=params.hidden_size
        )
        with torch.device("meta"):
            net: Any = FluxTransformer2DModel(
                num_layers=params.depth, num_single_layers=params.depth_single_blocks, guidance_embeds=False
            )
        net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        del state
    fused = [False]

    def clear() -> None:
        if fused[0]:
            net.unfuse_lora()
            net.unload_lora()
            fused[0] = False

    def change(path: str) -> None:
        clear()
        found, alphas = FluxLoraLoaderMixin.lora_state_dict(path, return_alphas=True)
        FluxLoraLoaderMixin.load_lora_into_transformer(found, alphas, net)
        net.fuse_lora()
        fused[0] = True

    return timed(change, clear, loras)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=["none", "int8", "none-side", "int8-side"],
        help="of ours, -side for beside the weights; fp8 merged takes minutes",
    )
    parser.add_argument("--run", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        which, folder = args.run[0], Path(args.run[1])
        model, loras = str(folder / "flux.safetensors"), [str(folder / f"{n}.safetensors") for n in (0, 1)]
        figures = theirs(model, loras) if which == "diffusers" else ours(model, loras, which)
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    params = FluxParams(depth=args.double, depth_single_blocks=args.single, guidance_embed=False)
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "flux.safetensors", params)
        for n in (0, 1):
            write_lora(Path(folder) / f"{n}.safetensors", params, args.rank, n)
        this = [sys.executable, "-m", "benchmarks.loras", "--run"]
        runs = interleave({one: [*this, one, folder] for one in ("diffusers", *args.schemes)}, repeats=args.repeats)
    report("loras", runs, "diffusers")


if __name__ == "__main__":
    main()
