"""diffusers in bfloat16: eager, channels last, compiled; torchao's int8 and zentorch on top of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Torch:
    """A network of diffusers' with its inputs."""

    def __init__(self, call: Callable[[int], Any]) -> None:
        self._call = call

    def prompt(self) -> None:
        """Nothing is done once: diffusers reads prompt and time anew at every call."""

    def step(self, call: int) -> Any:
        return self._call(call)


def make(place: Path, case: dict[str, Any], options: set[str], cache: Path, threads: int) -> Torch:
    """Read the network, and do to it what the options say."""
    if "compile" in options:  # read when torch's compiler is imported
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    import diffusers
    import torch
    from safetensors.torch import load_file

    from benchmarks.rivals.cases import KINDS, run

    torch.set_num_threads(threads)
    kind = case["kind"]
    net = getattr(diffusers, KINDS[kind]).from_pretrained(place, torch_dtype=torch.bfloat16)
    net.eval().requires_grad_(False)
    told = load_file(place / "inputs.safetensors")
    keep = ("times", "img_ids", "txt_ids", "time_ids")
    told = {name: tensor if name in keep else tensor.bfloat16() for name, tensor in told.items()}
    if kind == "flux":
        told["times"] = told["times"].bfloat16()
    if "channels_last" in options and kind != "flux":
        net.to(memory_format=torch.channels_last)
        name = "z" if kind == "vae" else "sample"
        told[name] = told[name].contiguous(memory_format=torch.channels_last)
    if "torchao" in options:
        from torchao import quantization  # pyright: ignore[reportMissingImports]

        quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig(), filter_fn=_in_blocks)
    if "zentorch" in options:
        import zentorch  # noqa: F401  registers its backend  # pyright: ignore[reportMissingImports]
    if "compile" in options:
        backend = "zentorch" if "zentorch" in options else "inductor"
        if kind == "vae":
            net.decoder = torch.compile(net.decoder, backend=backend, dynamic=False)
        else:
            net.forward = torch.compile(net.forward, backend=backend, dynamic=False)

    def call(number: int) -> Any:
        with torch.no_grad():  # inference mode keeps torch.compile from freezing
            return run(kind, net, told, number)

    return Torch(call)


def _in_blocks(module: Any, name: str) -> bool:
    """The linears that ours has in 8 bits, too: those of the blocks."""
    import torch

    inside = ("transformer_blocks", "single_transformer_blocks")
    modulation = ("norm1.linear", "norm1_context.linear", ".norm.linear")
    return (
        isinstance(module, torch.nn.Linear) and any(part in name for part in inside) and not name.endswith(modulation)
    )
