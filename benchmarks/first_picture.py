"""From the start of a process to its first picture: flux-engine against diffusers' FluxPipeline, same weights.

    python -m benchmarks.first_picture [--model demo-schnell] [--repeats 7] [--dtype bfloat16] [--compile]

Both make one picture of the same size in the same number of steps and dtype, from files on disk. `import` runs from
the start of the interpreter until everything needed is imported; `load` reads the model; `picture` is the request.
`--compile` adds both compiled, diffusers by torch.compile of the transformer and the decoder, with nothing kept of it
and with what an earlier process kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

PROMPT = "a large red circle on a blue background"

COMMON = """
import json, sys, time
from flux_engine.cli import _since_process_start as now
prompt, place, dtype, steps, side, length, cache = sys.argv[1:8]
steps, side, length = int(steps), int(side), int(length)
def finish(**seconds):
    # Not by getrusage, whose figure begins with that of the process that started this one.
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({**seconds, "start to picture": now(), "peak MB": peak}))
"""
OURS = (
    COMMON
    + """
import flux_engine
load = flux_engine.load
imported = now()
began = time.perf_counter()
compiled = {"compile": "default", "compile_cache": cache} if cache else {}
engine = load(place, device="cpu", dtype=dtype, **compiled)
loaded = time.perf_counter() - began
began = time.perf_counter()
image = engine(prompt, seed=0, num_inference_steps=steps, width=side, height=side).image
finish(**{"import": imported, "load": loaded, "picture": time.perf_counter() - began})
"""
)
THEIRS = (
    COMMON
    + """
import os
if cache:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
import torch
from diffusers import FluxPipeline
import transformers
transformers.CLIPTextModel, transformers.T5EncoderModel
imported = now()
began = time.perf_counter()
pipe = FluxPipeline.from_pretrained(place, torch_dtype=getattr(torch, dtype))
pipe.set_progress_bar_config(disable=True)
if cache:
    pipe.transformer.compile()
    pipe.vae.decoder.compile()
loaded = time.perf_counter() - began
began = time.perf_counter()
image = pipe(prompt, width=side, height=side, num_inference_steps=steps, guidance_scale=0.0,
             max_sequence_length=length, generator=torch.Generator("cpu").manual_seed(0)).images[0]
finish(**{"import": imported, "load": loaded, "picture": time.perf_counter() - began})
"""
)


def main() -> None:
    """Export the model, run both in turn, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-schnell")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    from flux_engine import load
    from flux_engine.specs import FluxSpec

    engine = load(args.model, device="cpu", dtype=args.dtype)
    spec = engine.spec
    if not isinstance(spec, FluxSpec):
        parser.error(f"{spec.name} is no FLUX.1 model, and the rival's script is for these")
    side, _ = spec.sizes.named("1:1")
    shared = [args.dtype, str(spec.num_inference_steps), str(side), str(spec.max_sequence_length)]
    with tempfile.TemporaryDirectory() as folder:
        engine.export(Path(folder) / "exported")
        ours = [sys.executable, "-c", OURS, PROMPT, args.model, *shared]
        candidates = {
            "flux-engine": [*ours, ""],
            "diffusers": [sys.executable, "-c", THEIRS, PROMPT, f"{folder}/exported", *shared, ""],
        }
        if args.compile:
            for name, script, place in (("ours", OURS, args.model), ("diffusers", THEIRS, f"{folder}/exported")):
                cold, kept = f"{folder}/{name}-cold", f"{folder}/{name}-kept"
                emptied = f"import shutil; shutil.rmtree({cold!r}, ignore_errors=True)\n{script}"
                called = [PROMPT, place, *shared]
                candidates |= {
                    f"{name} compiled, nothing kept": [sys.executable, "-c", emptied, *called, cold],
                    f"{name} compiled, kept": [sys.executable, "-c", script, *called, kept],
                }
        runs = harness.interleave(
            candidates,
            repeats=args.repeats,
            environment={"HF_HUB_OFFLINE": "1"},
        )
    harness.report("first_picture", runs, "diffusers")


if __name__ == "__main__":
    main()
