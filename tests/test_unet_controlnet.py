"""SDXL's ControlNets against diffusers', on the same weights, and in every layout people have them in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise, relative_error
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from sdxl_models import BASE, WIDTHS
from torch import Tensor

from flux_engine import WeightsError
from flux_engine.checkpoints import detect, export
from flux_engine.checkpoints.inspect import inspect
from flux_engine.checkpoints.keys import Table, to_theirs
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.checkpoints.tables import unet_controlnet_diffusers, unet_controlnet_sgm, unet_sgm
from flux_engine.families.base import channels_last
from flux_engine.models.layers import Residuals
from flux_engine.models.unet import UNet
from flux_engine.models.unet_attention import UNetStatics
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.params import UNetControlNetParams

TOLERANCE = 1e-5
FULL = UNetControlNetParams.of(BASE.unet)
NONE = (None, None, None)
CONTROLNETS = {
    "full": FULL,
    "mid": replace(FULL, transformer_depth=(None, 0, 1), mid_depth=1),
    "small": replace(FULL, transformer_depth=NONE, mid_depth=0),
    "no attention above": replace(FULL, transformer_depth=(None, None, 1), mid_depth=1),
    "no attention": replace(FULL, transformer_depth=NONE, mid_depth=None),
    "another hint": replace(FULL, conditioning_channels=4, embedding_channels=(8, 24)),
}
PUBLISHED = {
    "full": UNetControlNetParams(),
    "mid": UNetControlNetParams(transformer_depth=(None, 0, 1), mid_depth=1),
    "small": UNetControlNetParams(transformer_depth=NONE, mid_depth=0),
}
Tensors = dict[str, Tensor]


def pair(params: UNetControlNetParams) -> tuple[UNetControlNet, ControlNetModel]:
    ours = UNetControlNet(params)
    randomise(ours, 3)
    ours.controlnet_cond_embedding.conv_out.weight.mul_(16)  # to matter: each SiLU before it makes less of a picture
    theirs = ControlNetModel(**config_of(params))
    theirs.load_state_dict(export.unet_controlnet_tensors(ours), strict=True)
    return ours, theirs.eval()


def config_of(params: UNetControlNetParams) -> dict[str, Any]:
    config = export.unet_controlnet_config(params)
    del config["_class_name"]
    return config


def unet_pair() -> tuple[UNet, UNet2DConditionModel]:
    ours = UNet(BASE.unet)
    randomise(ours, 1)
    config = export.unet_config(BASE.unet)
    del config["_class_name"]
    theirs = UNet2DConditionModel(**config)
    theirs.load_state_dict(export.unet_tensors(ours), strict=True)
    return ours, theirs.eval()


def inputs(batch: int) -> dict[str, Tensor]:
    """What `precompute` is told, but for the timesteps."""
    return {
        "context": torch.randn(batch, 7, sum(WIDTHS)),
        "pooled": torch.randn(batch, WIDTHS[1]),
        "time_ids": torch.randint(0, 1500, (batch, 6)).float(),
    }


def picture_for(params: UNetControlNetParams, batch: int, size: tuple[int, int]) -> Tensor:
    scale = 2 ** (len(params.embedding_channels) - 1)
    return torch.rand(batch, params.conditioning_channels, *(scale * side for side in size))


@pytest.mark.parametrize("name", CONTROLNETS)
@pytest.mark.parametrize("size", [(8, 16), (7, 5)], ids=["even", "odd"])
def test_controlnet_agrees_with_diffusers(name: str, size: tuple[int, int]) -> None:
    """Every residual, and the UNet that reads them; another picture is another residual and another prediction."""
    params = CONTROLNETS[name]
    (ours, theirs), (unet, their_unet) = pair(params), unet_pair()
    torch.manual_seed(2)
    x, told, picture = torch.randn(2, 4, *size), inputs(2), picture_for(params, 2, size)
    times = torch.tensor([999.0, 480.5, 1.0])
    with torch.inference_mode():
        statics, unet_statics = ours.precompute(**told, timesteps=times), unet.precompute(**told, timesteps=times)
        hint, other = ours.embed_hint(picture), ours.embed_hint(1 - picture)
        assert hint.shape == (2, params.block_out_channels[0], *size)
        added = {"text_embeds": told["pooled"], "time_ids": told["time_ids"]}
        for call, t in enumerate(times):
            mine = ours(x, hint, call, statics)
            down, middle = theirs(x, t, told["context"], picture, 1.0, added_cond_kwargs=added, return_dict=False)
            assert len(mine) == len(down) + 1 == 10
            for a, b in zip(mine, (*down, middle), strict=True):
                assert relative_error(a, b) <= TOLERANCE
            for a, b in zip(ours(x, other, call, statics), mine, strict=True):
                assert relative_error(a, b) >= 1e-2
            reference = their_unet(
                x, t, told["context"], added_cond_kwargs=added,
                down_block_additional_residuals=down, mid_block_additional_residual=middle,
            ).sample  # fmt: skip
            steered = unet(x, call, unet_statics, mine)
            assert relative_error(steered, reference) <= TOLERANCE
            assert relative_error(steered, unet(x, call, unet_statics)) >= 1e-2
            assert relative_error(steered, unet(x, call, unet_statics, ours(x, other, call, statics))) >= 1e-2


def test_every_residual_goes_where_it_belongs() -> None:
    """One at a time, against diffusers with zeros for the others; none at all changes nothing."""
    unet, theirs = unet_pair()
    torch.manual_seed(2)
    x, told, t = torch.randn(1, 4, 7, 5), inputs(1), torch.tensor([500.0])
    controlnet, _ = pair(FULL)
    with torch.inference_mode():
        statics = unet.precompute(**told, timesteps=t)
        hint = controlnet.embed_hint(torch.rand(1, 3, 56, 40))
        all_of_them = controlnet(x, hint, 0, controlnet.precompute(**told, timesteps=t))
        plain = unet(x, 0, statics)
        assert torch.equal(unet(x, 0, statics, (None,) * 10), plain)
        for slot, residual in enumerate(all_of_them):
            alone: Residuals = (None,) * slot + (residual,) + (None,) * (9 - slot)
            given = [torch.zeros_like(r) if i != slot else r for i, r in enumerate(all_of_them)]
            reference = theirs(
                x, t, told["context"],
                added_cond_kwargs={"text_embeds": told["pooled"], "time_ids": told["time_ids"]},
                down_block_additional_residuals=given[:-1], mid_block_additional_residual=given[-1],
            ).sample  # fmt: skip
            assert relative_error(unet(x, 0, statics, alone), reference) <= TOLERANCE
            assert relative_error(plain, reference) >= 1e-3
        with pytest.raises(ValueError, match="zip"):
            unet(x, 0, statics, all_of_them[:-1])


def test_every_input_of_the_controlnet_matters() -> None:
    ours, _ = pair(FULL)
    torch.manual_seed(2)
    told = {**inputs(1), "timesteps": torch.tensor([500.0])}
    x = torch.randn(1, 4, 8, 8)
    hint = ours.embed_hint(torch.rand(1, 3, 64, 64))
    reference = ours(x, hint, 0, ours.precompute(**told))
    for name, value in told.items():
        changed = ours(x, hint, 0, ours.precompute(**(told | {name: value * 0.5})))
        assert relative_error(changed[-1], reference[-1]) >= 1e-2, name
    with pytest.raises(ValueError, match="guidance"):
        ours.precompute(**told, guidance=torch.ones(1))


@pytest.mark.parametrize(
    ("name", "dtype", "side"),
    [("full", torch.float32, 72), *((name, torch.bfloat16, 12) for name in ("full", "mid", "small"))],
    ids=["full, float32", "full", "mid", "small"],
)
def test_a_batch_has_the_bits_of_single_requests(name: str, dtype: torch.dtype, side: int) -> None:
    """In float32 where every state has over 20,480 numbers, as SDXL's have: torch convolves a single one that is
    smaller in another way."""
    ours, unet = (channels_last(net.to(dtype)) for net in (pair(CONTROLNETS[name])[0], unet_pair()[0]))
    torch.manual_seed(2)
    x, picture = torch.randn(3, 4, side, side), torch.rand(3, 3, 8 * side, 8 * side)
    times = torch.tensor([999.0, 480.5])
    told = [inputs(1) for _ in range(3)]
    with torch.inference_mode():
        hints = [ours.embed_hint(p) for p in picture.split(1)]
        assert torch.equal(ours.embed_hint(picture), torch.cat(hints))
        parts, unet_parts = ([net.precompute(**t, timesteps=times) for t in told] for net in (ours, unet))
        statics, unet_statics = UNetStatics.cat(parts), UNetStatics.cat(unet_parts)
        for call in range(2):
            together = ours(x, torch.cat(hints), call, statics)
            steered = unet(x, call, unet_statics, together)
            for i, one in enumerate(x.split(1)):
                alone = ours(one, hints[i], call, parts[i])
                assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))
                assert torch.equal(steered[i : i + 1], unet(one, call, unet_parts[i], alone))
        same = ours(x, hints[0], 0, statics)
        assert all(torch.equal(a, b) for a, b in zip(same, ours(x, torch.cat(hints[:1] * 3), 0, statics), strict=True))


def tables(params: UNetControlNetParams) -> dict[str, Table]:
    attention, hints = [depth is not None for depth in params.transformer_depth], 2 * len(params.embedding_channels)
    return {"SGM": unet_controlnet_sgm(attention, hints), "diffusers": unet_controlnet_diffusers(attention, hints)}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", CONTROLNETS)
@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("layout", ["SGM", "diffusers"])
def test_the_same_controlnet_in_every_layout(tmp_path: Path, name: str, prefix: str, layout: str) -> None:
    params = CONTROLNETS[name]
    ours = UNetControlNet(params)
    randomise(ours, 3)
    state = ours.state_dict()
    path = tmp_path / "x.safetensors"
    save_file(under(prefix, to_theirs(state, tables(params)[layout])), path)
    with WeightSource.open(path) as file:
        assert [(p.kind, p.layout, p.prefix) for p in detect.parts_of(file)] == [("unet_controlnet", layout, prefix)]
        source = detect.pick(file, "unet_controlnet")
        assert set(source.shapes) == set(state)
        assert all(torch.equal(source.rows(key), tensor) for key, tensor in state.items())
        reads = any(params.transformer_depth) or params.mid_depth
        assert UNetControlNetParams.from_shapes(source.shapes) == (
            params if reads else replace(params, cross_attention_dim=2048)
        )
        loaded = load_module(
            lambda: UNetControlNet(UNetControlNetParams.from_shapes(source.shapes)),
            source,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
        with pytest.raises(WeightsError, match="is not an SDXL UNet: it holds a ControlNet for SDXL"):
            detect.pick(file, "unet")
    (part,) = inspect(path)["parts"]
    assert (part["what"], part["layout"]) == ("a ControlNet for SDXL", layout)
    assert part["missing"] == part["not known"] == part["of another shape"] == []


def test_a_unet_with_its_controlnet_in_one_file(tmp_path: Path) -> None:
    controlnet, unet = UNetControlNet(FULL), UNet(BASE.unet)
    attention = [depth is not None for depth in FULL.transformer_depth]
    path = tmp_path / "x.safetensors"
    stored = under("control_model.", to_theirs(controlnet.state_dict(), tables(FULL)["SGM"]))
    del stored["control_model.zero_convs.3.0.bias"]
    save_file(stored | under("model.diffusion_model.", to_theirs(unet.state_dict(), unet_sgm(attention))), path)
    report = inspect(path)
    assert [(part["what"], part["prefix"]) for part in report["parts"]] == [
        ("an SDXL UNet", "model.diffusion_model."),
        ("a ControlNet for SDXL", "control_model."),
    ]
    assert [part["missing"] for part in report["parts"]] == [[], ["control_model.zero_convs.3.0.bias"]]
    assert report["rest"] == []


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("full", 844, 1_251_014_160), ("mid", 224, 272_586_000), ("small", 140, 160_111_120)],
)
def test_published_controlnets_at_full_size(name: str, tensors: int, parameters: int) -> None:
    """In float16 2.50 GB, 545 MB and 320 MB, as the published files are."""
    params = PUBLISHED[name]
    with torch.device("meta"):
        ours = UNetControlNet(params).state_dict()
        theirs = ControlNetModel(**config_of(params)).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    stored = to_theirs(ours, tables(params)["diffusers"])
    assert {key: tensor.shape for key, tensor in stored.items()} == {k: t.shape for k, t in theirs.items()}
    assert UNetControlNetParams.from_shapes(shapes) == params
    assert (len(theirs), sum(tensor.numel() for tensor in ours.values())) == (tensors, parameters)
    single = to_theirs(ours, tables(params)["SGM"])
    assert len(single) == tensors
    assert single["input_hint_block.14.weight"].shape == (320, 256, 3, 3)
    assert single["zero_convs.8.0.weight"].shape == single["middle_block_out.0.weight"].shape == (1280, 1280, 1, 1)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"),
         "a ControlNet for Stable Diffusion 1 or 2"),
        (("input_blocks.0.0.weight", "input_hint_block.0.weight", "zero_convs.0.0.weight"),
         "a ControlNet for Stable Diffusion 1 or 2"),
        (("controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.weight",
          "control_add_embedding.linear_1.weight"), "a ControlNet for SDXL that follows pictures of several kinds"),
        (("lora_controlnet", "input_hint_block.0.weight", "label_emb.0.0.weight"), "a ControlNet that is a LoRA"),
    ],
)  # fmt: skip
def test_other_controlnets_are_called_by_name(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    with WeightSource.open(path) as file, pytest.raises(WeightsError, match=f"it holds {words}"):
        detect.pick(file, "unet_controlnet")
