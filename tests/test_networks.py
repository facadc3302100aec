"""Our networks against diffusers', on the same weights, in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import randomise, relative_error
from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux_engine.checkpoints import export
from flux_engine.families.flux import image_ids, patchify, unpatchify
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import FluxParams, UNetParams, VAEParams
from flux_engine.schedulers import flow_match_euler
from flux_engine.specs import FLUX_DEV

TOLERANCE = 1e-5

FLUX_CONFIGS = {
    "schnell-like": FluxParams(
        hidden_size=64, num_heads=2, axes_dim=(4, 14, 14), depth=2, depth_single_blocks=3,
        vec_in_dim=24, context_in_dim=40,
    ),
    "dev-like": FluxParams(
        hidden_size=96, num_heads=2, axes_dim=(6, 20, 22), depth=1, depth_single_blocks=1,
        vec_in_dim=32, context_in_dim=32, guidance_embed=True,
    ),
    "fill-like": FluxParams(
        hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2, in_channels=384,
        vec_in_dim=16, context_in_dim=64, guidance_embed=True,
    ),
    "true head width": FluxParams(
        hidden_size=256, num_heads=2, depth=2, depth_single_blocks=2, vec_in_dim=768, context_in_dim=128,
    ),
}  # fmt: skip


def flux_pair(params: FluxParams) -> tuple[Flux, FluxTransformer2DModel]:
    ours = Flux(params)
    randomise(ours, 1)
    config = export.flux_config(params)
    del config["_class_name"]
    theirs = FluxTransformer2DModel(**config)
    theirs.load_state_dict(export.flux_tensors(ours), strict=True)
    return ours, theirs.eval()


@pytest.mark.parametrize("name", FLUX_CONFIGS)
def test_flux_agrees_with_diffusers(name: str) -> None:
    params = FLUX_CONFIGS[name]
    ours, theirs = flux_pair(params)
    torch.manual_seed(2)
    batch, rows, columns, length = 2, 5, 3, 7
    x = torch.randn(batch, rows * columns, params.in_channels)
    context = torch.randn(batch, length, params.context_in_dim)
    pooled = torch.randn(batch, params.vec_in_dim)
    ids = image_ids(rows, columns)
    guidance = torch.tensor([3.5, 1.0]) if params.guidance_embed else None
    times = torch.tensor([1.0, 0.6, 0.03])
    with torch.inference_mode():
        statics = ours.precompute(context, pooled, ids, times, guidance)
        for call, t in enumerate(times):
            mine = ours(x, call, statics)
            reference = theirs(
                hidden_states=x,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=t.expand(batch),
                img_ids=ids,
                txt_ids=torch.zeros(length, 3),
                guidance=guidance,
                return_dict=False,
            )[0]
            assert mine.shape == (batch, rows * columns, params.out_channels)
            assert relative_error(mine, reference) <= TOLERANCE
        # Negative control: what the prompt and the time say reaches the output.
        other = ours.precompute(context.flip(1) * 2, pooled, ids, times, guidance)
        assert relative_error(ours(x, 0, other), ours(x, 0, statics)) > 1e-2
        assert relative_error(ours(x, 1, statics), ours(x, 0, statics)) > 1e-2


# All but one, whose axes are split unlike any published model's, on purpose.
@pytest.mark.parametrize("name", sorted(set(FLUX_CONFIGS) - {"dev-like"}))
def test_widths_and_depths_are_read_off_the_checkpoint(name: str) -> None:
    params = FLUX_CONFIGS[name]
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Flux(params).state_dict().items()}
    assert FluxParams.from_shapes(shapes) == params


@pytest.mark.parametrize(
    ("params", "tensors", "parameters"),
    [
        (FluxParams(), 776, 11_891_178_560),
        (FluxParams(guidance_embed=True), 780, 11_901_408_320),
        (FluxParams(guidance_embed=True, in_channels=128), 780, 11_901_604_928),
        (FluxParams(guidance_embed=True, in_channels=384), 780, 11_902_391_360),
    ],
)
def test_published_flux_has_its_published_size(params: FluxParams, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        state = Flux(params).state_dict()
    assert len(state) == tensors
    assert sum(v.numel() for v in state.values()) == parameters


def test_float16_stays_finite_where_the_residual_stream_overflows() -> None:
    params = FLUX_CONFIGS["schnell-like"]
    ours = Flux(params)
    randomise(ours, 1)
    with torch.no_grad():
        for block in ours.double_blocks:
            block.img_mlp[2].bias.fill_(60_000.0)
            block.txt_mlp[2].bias.fill_(60_000.0)
        for block in ours.single_blocks:
            block.linear2.bias.fill_(60_000.0)
    inputs = (torch.randn(1, 4, 40), torch.randn(1, 24), image_ids(2, 2), torch.tensor([1.0]), None)
    x = torch.randn(1, 4, 64)
    wide = ours.precompute(*inputs)
    stream, _ = ours.double_blocks[0](ours.img_in(x), wide.txt, *(m[0] for m in wide.double[0]), wide.cos, wide.sin)
    assert stream.abs().max() * 2 > 65504  # the test bites: two blocks leave float16's range
    half = ours.half()
    out = half(x.half(), 0, half.precompute(*inputs))
    assert out.dtype == torch.float16
    assert out.isfinite().all()


VAE_CONFIGS = {
    "flux-like": VAEParams(channels=16, channel_multipliers=(1, 2, 4, 4), norm_groups=8),
    "sdxl-like": VAEParams(
        channels=32, channel_multipliers=(1, 2, 4, 4), latent_channels=4, norm_groups=32,
        scaling_factor=0.13025, shift_factor=0.0, quant_conv=True,
    ),
    "three levels": VAEParams(channels=8, channel_multipliers=(1, 3, 3), num_res_blocks=1, norm_groups=4),
}  # fmt: skip


@pytest.mark.parametrize("name", VAE_CONFIGS)
def test_vae_agrees_with_diffusers(name: str) -> None:
    params = VAE_CONFIGS[name]
    ours = AutoEncoder(params)
    randomise(ours, 3)
    config = export.vae_config(params)
    del config["_class_name"]
    theirs = AutoencoderKL(**config).eval()
    theirs.load_state_dict(export.vae_tensors(ours), strict=True)
    torch.manual_seed(4)
    picture = torch.rand(2, 3, 40, 24) * 2 - 1
    with torch.inference_mode():
        mean = theirs.encode(picture).latent_dist.mean
        shift = params.shift_factor
        latent = params.scaling_factor * (mean - shift)
        assert relative_error(ours.encode(picture), latent) <= TOLERANCE
        reference = theirs.decode(latent / params.scaling_factor + shift).sample
        assert relative_error(ours.decode(latent), reference) <= TOLERANCE
        assert relative_error(ours.decode(latent.flip(0)), reference) > 1e-2


@pytest.mark.parametrize(
    ("params", "tensors"),
    [(VAEParams(), 244), (VAEParams(latent_channels=4, quant_conv=True), 248)],
)
def test_published_vae_has_its_published_tensors(params: VAEParams, tensors: int) -> None:
    with torch.device("meta"):
        state = AutoEncoder(params).state_dict()
    assert len(state) == tensors
    assert state["decoder.up.1.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    assert state["encoder.conv_out.weight"].shape == (2 * params.latent_channels, 512, 3, 3)


def test_patches_go_there_and_back() -> None:
    latent = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpatchify(patchify(latent), 6, 10), latent)


class NoSync(TorchDispatchMode):
    """Refuses every operation that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")), name
        assert "_to_copy" not in name or "device" not in (kwargs or {}), f"{name} moves between devices"
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device() -> None:
    params = FLUX_CONFIGS["dev-like"]
    ours = Flux(params)
    randomise(ours, 1)
    schedule = flow_match_euler(FLUX_DEV.schedule, 3, 6)
    statics = ours.precompute(
        torch.randn(1, 5, 32), torch.randn(1, 32), image_ids(2, 3), torch.tensor(schedule.timesteps), torch.ones(1)
    )
    x = torch.randn(1, 6, 64)
    with torch.inference_mode(), NoSync():
        for call in range(3):
            x = schedule.step(ours(x, call, statics), call, x)
    assert x.isfinite().all()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        x.sum().item()  # the test bites


NARROW = {"cross_attention_dim": 40, "head_dim": 16, "norm_groups": 16}
UNETS = {
    "base": UNetParams(block_out_channels=(32, 64, 96), transformer_depth=(0, 1, 2), mid_depth=2,
                       add_embed_dim=24 + 6 * 256, **NARROW),
    "refiner": UNetParams(block_out_channels=(48, 96, 128, 128), transformer_depth=(0, 1, 1, 0), mid_depth=1,
                          add_embed_dim=24 + 5 * 256, **NARROW),
    "inpainting": UNetParams(block_out_channels=(32, 64), transformer_depth=(1, 1), mid_depth=1, in_channels=9,
                             add_embed_dim=24 + 6 * 256, **NARROW),
    "LCM": UNetParams(block_out_channels=(32, 64), transformer_depth=(0, 1), mid_depth=1, guidance_embed=True,
                      add_embed_dim=24 + 6 * 256, **NARROW),
}  # fmt: skip


def unet_pair(params: UNetParams) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(0)
    ours = UNet(params)
    randomise(ours, 1)
    config = export.unet_config(params)
    del config["_class_name"]
    theirs = UNet2DConditionModel(**config)
    theirs.load_state_dict(export.unet_tensors(ours), strict=True)
    return ours, theirs.eval()


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(8, 16), (7, 5)], ids=["even", "odd"])
def test_unet_agrees_with_diffusers(name: str, size: tuple[int, int]) -> None:
    params = UNETS[name]
    ours, theirs = unet_pair(params)
    torch.manual_seed(2)
    x, context, pooled = torch.randn(2, params.in_channels, *size), torch.randn(2, 7, 40), torch.randn(2, 24)
    ids = torch.randint(0, 1500, (2, (params.add_embed_dim - 24) // 256)).float()
    guidance = torch.tensor([8.0, 1.5]) if params.guidance_embed else None
    times = torch.tensor([999.0, 480.5, 1.0])
    with torch.inference_mode():
        statics = ours.precompute(context, pooled, ids, times, guidance)
        for call, t in enumerate(times):
            told = {"text_embeds": pooled, "time_ids": ids}
            embedded = None if guidance is None else get_guidance_scale_embedding(guidance - 1)
            reference = theirs(x, t, context, timestep_cond=embedded, added_cond_kwargs=told).sample
            assert relative_error(ours(x, call, statics), reference) <= TOLERANCE


def get_guidance_scale_embedding(w: torch.Tensor) -> torch.Tensor:
    """diffusers' own, which is a method of its pipeline."""
    return StableDiffusionXLPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)  # pyright: ignore


def test_every_input_of_the_unet_matters() -> None:
    params = UNETS["LCM"]
    ours, _ = unet_pair(params)
    torch.manual_seed(2)
    inputs = {
        "context": torch.randn(1, 7, 40), "pooled": torch.randn(1, 24), "time_ids": torch.full((1, 6), 256.0),
        "timesteps": torch.tensor([500.0]), "guidance": torch.tensor([8.0]),
    }  # fmt: skip
    x = torch.randn(1, 4, 8, 8)

    def out(**changed: torch.Tensor) -> torch.Tensor:
        return ours(x, 0, ours.precompute(**(inputs | changed)))

    with torch.inference_mode():
        for name, value in inputs.items():
            assert relative_error(out(**{name: value * 0.5}), out()) >= 1e-2, name


def test_linears_of_an_sdxl_call() -> None:
    """At SDXL's full depth: 70 blocks of 6, and 11 transformers of 2. Nothing that depends on time, size or text."""
    params = UNetParams(
        block_out_channels=(16, 32, 64), cross_attention_dim=8, head_dim=16, norm_groups=8, add_embed_dim=6 * 256 + 8
    )
    ours, theirs = unet_pair(params)
    context, pooled, ids = torch.randn(1, 3, 8), torch.randn(1, 8), torch.zeros(1, 6)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500.0])
    with torch.inference_mode():
        statics = ours.precompute(context, pooled, ids, t)
        mine = linears(ours, lambda: ours(x, 0, statics))
        told = {"text_embeds": pooled, "time_ids": ids}
        reference = linears(theirs, lambda: theirs(x, t, context, added_cond_kwargs=told))
    assert (mine, reference) == (442, 743)


def linears(network: nn.Module, call: Callable[[], object]) -> int:
    """How many linears a call runs."""
    count = 0

    def seen(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [m.register_forward_hook(seen) for m in network.modules() if isinstance(m, nn.Linear)]
    call()
    for handle in handles:
        handle.remove()
    return count
