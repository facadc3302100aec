"""What every engine runs: a network's weights in one file, noise, and what float32 makes of them.

Weights are random numbers, drawn from a seed and scaled so that errors of rounding mean something: matrices keep the
size of what passes through them, what is added to a stream is divided by the root of its depth, and modulation moves
every channel by some tenths. They are stored in bfloat16, so that all engines begin from the same numbers; the
reference computes with these in float32. What the text changes is told beside it (`control`): where that is little,
errors say nothing.

Shapes: B batch, L tokens, D width, C channels, h w latent size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, INPUTS, CASE = "diffusion_pytorch_model.safetensors", "inputs.safetensors", "case.json"
CALLS = 4
"""Steps of a walk, as many as FLUX.1 schnell has."""
COMPARED = (0, CALLS - 1)
"""Calls of which the outputs are compared: not the first alone, so that an engine that repeats itself is found out."""
FLUX_CONFIG: Mapping[str, Any] = MappingProxyType(
    {"in_channels": 64, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
     "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56)}
)  # fmt: skip
UNET_CONFIG: Mapping[str, Any] = MappingProxyType(
    {"sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
     "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
     "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
     "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
     "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
     "projection_class_embeddings_input_dim": 2816}
)  # fmt: skip
VAE_CONFIG: Mapping[str, Any] = MappingProxyType(
    {"in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
     "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
     "layers_per_block": 2, "norm_num_groups": 32, "use_quant_conv": False, "use_post_quant_conv": False,
     "scaling_factor": 0.3611, "shift_factor": 0.1159}
)  # fmt: skip
KINDS = {"flux": "FluxTransformer2DModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
"""Kind of network -> diffusers' class."""


@dataclass(frozen=True)
class Case:
    """One network at one size."""

    name: str
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    h: int
    w: int
    """Of the latent."""
    text: int = 0
    """Tokens of the prompt."""
    batch: int = 1


def _flux(name: str, double: int, single: int, side: int = 64, text: int = 256, **narrower: Any) -> Case:
    config = {**FLUX_CONFIG, "num_layers": double, "num_single_layers": single, **narrower}
    return Case(name, "flux", config, side, side, text)


_NARROW = {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32}
CASES: Mapping[str, Case] = MappingProxyType(
    {
        case.name: case
        for case in (
            _flux("flux-1+2", 1, 2),
            _flux("flux-2+4", 2, 4),
            Case("sdxl-512", "unet", UNET_CONFIG, 64, 64, 77, batch=2),
            Case("vae-512", "vae", VAE_CONFIG, 64, 64),
            # To try an engine in seconds.
            _flux("tiny-flux", 1, 1, side=16, text=16, **_NARROW),
            Case("tiny-unet", "unet",
                 {**UNET_CONFIG, "block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 1),
                  "attention_head_dim": (1, 1, 1), "cross_attention_dim": 64, "addition_time_embed_dim": 256,
                  "projection_class_embeddings_input_dim": 6 * 256 + 32}, 16, 16, 77, batch=2),
            Case("tiny-vae", "vae", {**VAE_CONFIG, "block_out_channels": (32, 32, 32, 32)}, 8, 8),
        )
    }
)  # fmt: skip


def make(case: Case, folder: Path) -> Path:
    """The case's folder, which is written where it is not there: weights and config as diffusers keeps them, inputs,
    reference."""
    place = folder / case.name
    wanted = json.dumps(asdict(replace(case, config=dict(case.config))), default=list)
    if (place / CASE).is_file() and json.loads((place / CASE).read_text())["case"] == json.loads(wanted):
        return place
    place.mkdir(parents=True, exist_ok=True)
    (place / CASE).unlink(missing_ok=True)
    net = network(case)
    net.save_config(place)
    tensors = weights(net, depth=_depth(case))
    save_file(tensors, place / WEIGHTS)
    told = inputs(case)
    save_file(told, place / INPUTS)
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    del tensors
    with torch.inference_mode():
        outputs = {str(call): run(case.kind, net, told, call) for call in COMPARED}
        save_file(outputs, place / "reference.safetensors")
        text = next(name for name in told if name.startswith(("encoder_hidden", "z")))
        without = run(case.kind, net, told | {text: torch.zeros_like(told[text])}, 0)
    control = error_of(without, outputs["0"])
    (place / CASE).write_text(json.dumps({"case": json.loads(wanted), "kind": case.kind, "calls": CALLS,
                                          "compared": COMPARED, "control": control}))  # fmt: skip
    return place


def network(case: Case) -> Any:
    """diffusers' network on the meta device."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, KINDS[case.kind])(**case.config).eval().requires_grad_(False)


def weights(net: nn.Module, *, depth: int, seed: int = 2024) -> dict[str, Tensor]:
    """In bfloat16. `depth` counts what is added to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in net.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    made: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            if id(parameter) in norms and name.endswith("weight"):
                noise = 1 + 0.1 * noise
            else:
                noise *= 0.3 if _modulates(name) else 0.02
        else:
            noise /= math.sqrt(parameter[0].numel())
            if _modulates(name):
                noise *= 0.5
            elif _adds(name):
                noise /= math.sqrt(2 * depth)
        made[name] = noise.bfloat16()
    return made


def _modulates(name: str) -> bool:
    """Whether a parameter makes shifts, scales and gates."""
    return any(part in name for part in ("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear"))


def _adds(name: str) -> bool:
    """Whether a matrix gives what is added to the stream."""
    ends = ("to_out.0.weight", "to_add_out.weight", ".net.2.weight", "proj_out.weight", "conv2.weight")
    return name.endswith(ends) and name != "proj_out.weight"


def _depth(case: Case) -> int:
    if case.kind == "flux":
        return case.config["num_layers"] * 2 + case.config["num_single_layers"]
    return 8 if case.kind == "unet" else 4  # of one resolution


def inputs(case: Case, seed: int = 7) -> dict[str, Tensor]:
    """Noise and the rest that a network reads, float32, by diffusers' names; "times" has one for every call."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, h, w, config = case.batch, case.h, case.w, case.config
    if case.kind == "vae":
        return {"z": random(B, config["latent_channels"], h, w), "times": torch.zeros(CALLS)}
    if case.kind == "unet":
        text = random(B, case.text, config["cross_attention_dim"])
        pooled = random(B, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])
        ids = torch.tensor([[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]] * B)
        return {"sample": random(B, 4, h, w), "encoder_hidden_states": text, "text_embeds": pooled, "time_ids": ids,
                "times": torch.tensor([999.0, 749.0, 499.0, 249.0])}  # fmt: skip
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None]
    return {
        "hidden_states": random(B, h * w // 4, config["in_channels"]),
        "encoder_hidden_states": random(B, case.text, config["joint_attention_dim"]),
        "pooled_projections": random(B, config["pooled_projection_dim"]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(case.text, 3),
        "times": torch.tensor([1.0, 0.75, 0.5, 0.25]),
    }


def run(kind: str, net: Any, told: Mapping[str, Tensor], call: int) -> Tensor:
    """One call of diffusers' network, in the dtype of its inputs."""
    time = told["times"][call]
    if kind == "vae":
        return net.decode(told["z"], return_dict=False)[0].float()
    if kind == "unet":
        added = {"text_embeds": told["text_embeds"], "time_ids": told["time_ids"]}
        return net(told["sample"], time, told["encoder_hidden_states"], added_cond_kwargs=added,
                   return_dict=False)[0].float()  # fmt: skip
    keys = ("hidden_states", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
    batch = len(told["hidden_states"])
    return net(**{key: told[key] for key in keys}, timestep=time.expand(batch), return_dict=False)[0].float()


def error_of(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def errors(place: Path, outputs: Path) -> dict[str, float]:
    """Of what an engine wrote, against the reference: "error", the worst of the compared calls, and "error L2". A
    tensor that is missing or of another shape is an infinite one."""
    reference, found = load_file(place / "reference.safetensors"), load_file(outputs)
    worst, square = 0.0, 0.0
    for call, exact in reference.items():
        ours = found.get(call)
        if ours is None or ours.shape != exact.shape or not ours.isfinite().all():
            return {"error": math.inf, "error L2": math.inf}
        worst = max(worst, error_of(ours, exact))
        square = max(square, float((ours.double() - exact.double()).norm() / exact.double().norm()))
    return {"error": worst, "error L2": square}
