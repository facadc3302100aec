"""Weights of 8 bits in other tools' layouts stand for the numbers that those tools make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_engine
from flux_engine import WeightsError, hub
from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.export import flux_tensors
from flux_engine.checkpoints.source import WeightSource
from flux_engine.models.flux import Flux
from flux_engine.specs import DEMO_SCHNELL

SCHNELL = hub.weights_folder() / "demo" / "flux" / "transformer" / "schnell.safetensors"
Tensors = dict[str, Tensor]


def text(said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def is_linear(name: str, tensor: Tensor) -> bool:
    return "blocks" in name and name.endswith(".weight") and tensor.ndim == 2


def per_tensor(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().max() / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def comfy(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    values, scale = per_tensor(weight)
    stem = name.removesuffix("weight")
    return {name: values, f"{stem}scale_weight": scale, f"{stem}scale_input": scale}, values.float() * scale


def comfy_newer(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    values, scale = per_tensor(weight, torch.float8_e5m2)
    stem = name.removesuffix("weight")
    said = {f"{stem}comfy_quant": text({"format": "float8_e5m2"})}
    return said | {name: values, f"{stem}weight_scale": scale, f"{stem}input_scale": scale}, values.float() * scale


def int8_rows(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    values = (weight.float() / scale).round().to(torch.int8)
    stem = name.removesuffix("weight")
    said = {f"{stem}comfy_quant": text({"format": "int8_tensorwise"})}
    return said | {name: values, f"{stem}weight_scale": scale}, values.float() * scale


def fp8_api(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    values, inverse = per_tensor(weight)
    stem = name.removesuffix("weight")
    scales = {"scale": 1 / inverse, "scale_reciprocal": inverse, "input_scale": inverse,
              "input_scale_reciprocal": 1 / inverse}  # fmt: skip
    stored = {f"{stem}float8_data": values, name: torch.zeros(1, dtype=torch.bfloat16)}
    return stored | {stem + key: scale for key, scale in scales.items()}, values.float() * inverse


def cast(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    values = weight.to(torch.float8_e4m3fn)
    return {name: values}, values.float()


LAYOUTS: dict[str, Callable[[str, Tensor], tuple[Tensors, Tensor]]] = {
    "ComfyUI": comfy, "ComfyUI's newer": comfy_newer, "int8 by rows": int8_rows, "flux-fp8-api": fp8_api, "cast": cast,
}  # fmt: skip


def written(layout: str, tensors: Tensors, path: Path, prefix: str = "") -> Tensors:
    """Write tensors in a layout -> the numbers that they then stand for."""
    stored: Tensors = {}
    exact: Tensors = {}
    for name, tensor in tensors.items():
        parts, exact[name] = LAYOUTS[layout](name, tensor) if is_linear(name, tensor) else ({name: tensor}, tensor)
        stored |= {prefix + part: value.clone().contiguous() for part, value in parts.items()}
    if layout == "ComfyUI":
        stored[f"{prefix}scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(stored, path)
    return exact


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["plain", "prefixed"])
def test_every_number_is_what_the_layout_says(layout: str, prefix: str, tmp_path: Path) -> None:
    exact = written(layout, load_file(SCHNELL), tmp_path / "x.safetensors", prefix)
    with WeightSource.open(tmp_path / "x.safetensors") as opened:
        source = pick(opened, "flux")
        assert source.recipes.keys() == exact.keys()
        for name, numbers in exact.items():
            read = source.rows(name, dtype=torch.float32)
            assert torch.allclose(read, numbers.float(), rtol=1e-6, atol=0), name
            if len(numbers) > 3:
                assert torch.equal(source.rows(name, 1, 3, dtype=torch.float32), read[1:3])
                assert torch.equal(source.rows(name, dtype=torch.bfloat16), read.bfloat16())


@pytest.mark.parametrize("layout", ["ComfyUI", "int8 by rows"])
def test_joined_projections_keep_their_own_scales(layout: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = Flux(DEMO_SCHNELL.transformer)
    net.load_state_dict(load_file(SCHNELL), assign=True)
    theirs = written(layout, flux_tensors(net), tmp_path / "x.safetensors")
    parts = [theirs[f"transformer_blocks.0.attn.to_{one}.weight"] for one in "qkv"]
    with WeightSource.open(tmp_path / "x.safetensors") as opened:
        read = pick(opened, "flux").rows("double_blocks.0.img_attn.qkv.weight", dtype=torch.float32)
    assert torch.allclose(read, torch.cat(parts), rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_picture_of_such_a_file(quantization: str, tmp_path: Path) -> None:
    exact = written("ComfyUI", load_file(SCHNELL), tmp_path / "x.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    engines = [
        flux_engine.load(tmp_path / file, dtype="float32", quantization=quantization)
        for file in ("x.safetensors", "exact.safetensors")
    ]
    ours, other = (engine("a red star", seed=0, output_type="np") for engine in engines)
    assert abs(ours.image.astype(float) - other.image).max() <= 1


LINEAR = "single_blocks.0.linear1"
WRONG: dict[str, tuple[str, Tensors, str]] = {
    "a scale of another shape": ("ComfyUI", {"scale_weight": torch.ones(3)}, "of shape .3. is no scale of 1344 rows"),
    "a negative scale": ("ComfyUI", {"scale_weight": torch.tensor(-1.0)}, "scale_weight is not a positive number"),
    "a scale that is not finite": ("ComfyUI", {"scale_weight": torch.tensor(float("nan"))}, "not a positive number"),
    "a scale in whole numbers": ("ComfyUI", {"scale_weight": torch.tensor(1)}, "is no scale"),
    "a scale of what is not of 8 bits": ("ComfyUI", {"weight": torch.ones(1344, 192)}, "not in 8 bits"),
    "another format": ("ComfyUI's newer", {"comfy_quant": text({"format": "nvfp4"})}, "says 'nvfp4'; read here are"),
    "no format": ("ComfyUI's newer", {"comfy_quant": text({})}, "does not say a format"),
    "no JSON": ("ComfyUI's newer", {"comfy_quant": torch.tensor([1], dtype=torch.uint8)}, "does not say a format"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_wrong_is_refused(wrong: str, tmp_path: Path) -> None:
    layout, changed, message = WRONG[wrong]
    path = tmp_path / "x.safetensors"
    written(layout, load_file(SCHNELL), path)
    save_file(load_file(path) | {f"{LINEAR}.{leaf}": tensor for leaf, tensor in changed.items()}, path)
    with pytest.raises(WeightsError, match=message):
        flux_engine.load(path)


def test_data_without_a_scale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written("flux-fp8-api", load_file(SCHNELL), path)
    tensors = load_file(path)
    del tensors[f"{LINEAR}.scale"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=f"has no '{LINEAR}.scale', without which {LINEAR}.float8_data says nothing"):
        flux_engine.load(path)


def test_such_a_file_becomes_one_of_ours(tmp_path: Path) -> None:
    written("flux-fp8-api", load_file(SCHNELL), tmp_path / "x.safetensors")
    folder = flux_engine.quantize(tmp_path / "x.safetensors", tmp_path / "saved")
    ours, other = (
        flux_engine.load(path, dtype="float32", quantization="int8")("a star", seed=0, output_type="latent").image
        for path in (folder, tmp_path / "x.safetensors")
    )
    assert torch.equal(ours, other)
