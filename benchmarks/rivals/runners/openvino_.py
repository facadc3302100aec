"""OpenVINO: diffusers' network traced at fixed shapes, in its default bfloat16, or in 8 bits by NNCF, calibrated.

What was converted is kept in the cache, so that later processes begin as a user's second one does.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any


class OpenVINO:
    """A compiled model with its inputs."""

    def __init__(self, request: Any, inputs: list[list[Any]]) -> None:
        self.request, self.inputs = request, inputs

    def prompt(self) -> None:
        """Nothing is done once."""

    def step(self, call: int) -> Any:
        import torch

        self.request.infer(self.inputs[call], share_inputs=True)
        return torch.from_numpy(self.request.get_output_tensor(0).data.copy())


def make(place: Path, case: dict[str, Any], options: set[str], cache: Path, threads: int) -> OpenVINO:
    """Convert what is not in the cache, and compile it."""
    import openvino as ov  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    told = load_file(place / "inputs.safetensors")
    names = names_of(case["kind"])
    read = [[told["times"][call : call + 1] if name == "times" else told[name] for name in names]
            for call in range(case["calls"])]  # fmt: skip
    arrays = [[tensor.numpy() for tensor in one] for one in read]
    saved = cache / "model.xml"
    core = ov.Core()
    if not saved.is_file():
        # By way of a file that is mapped, so that torch's copy of the weights is gone before there is another one.
        plain = cache / "plain.xml" if "int8" in options else saved
        ov.save_model(converted(place, case["kind"], read[0]), plain, compress_to_fp16=False)
        gc.collect()
        if "int8" in options:
            import nncf  # pyright: ignore[reportMissingImports]

            # Of the first and the last call: with one alone, the ranges do not hold at other times.
            samples = [arrays[call] for call in case["compared"]]
            model = nncf.quantize(
                core.read_model(plain),
                nncf.Dataset(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(samples),
            )
            ov.save_model(model, saved, compress_to_fp16=False)
            del model
            gc.collect()
    model = core.read_model(saved)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return OpenVINO(core.compile_model(model, "CPU", settings).create_infer_request(), arrays)


def names_of(kind: str) -> list[str]:
    """The inputs of a network in the order in which it is traced."""
    return {
        "flux": ["hidden_states", "encoder_hidden_states", "pooled_projections", "times"],
        "unet": ["sample", "times", "encoder_hidden_states", "text_embeds", "time_ids"],
        "vae": ["z"],
    }[kind]


def wrapped(place: Path, kind: str) -> Any:
    """diffusers' network in float32 that takes its inputs one after the other."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    from benchmarks.rivals.cases import KINDS, run

    net = getattr(diffusers, KINDS[kind]).from_pretrained(place, torch_dtype=torch.float32)
    net.eval().requires_grad_(False)
    names = names_of(kind)
    # Positions are constants at fixed shapes, and so rotary tables are made once, in float32, when it is converted.
    told = load_file(place / "inputs.safetensors")
    fixed = {name: tensor for name, tensor in told.items() if name in ("img_ids", "txt_ids")}

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            told = {"times": torch.zeros(1), **fixed, **dict(zip(names, inputs, strict=True))}
            return run(kind, self.net, told, 0)

    return Positional().eval()


def converted(place: Path, kind: str, example: list[Any]) -> Any:
    """At fixed shapes, which is what OpenVINO is fastest with."""
    import openvino as ov  # pyright: ignore[reportMissingImports]
    import torch

    with torch.no_grad():
        shapes = [tuple(tensor.shape) for tensor in example]
        return ov.convert_model(wrapped(place, kind), example_input=tuple(example), input=shapes)
