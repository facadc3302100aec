"""Networks of the published models' true widths with random numbers in them: what a step costs does not depend on the
numbers, and nobody has to download 34 GB to know it.

Shapes: B batch, S calls, L tokens (Li image, Lt text), D width, C channels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flux_engine import hardware, work
from flux_engine.bench.ceilings import Sizes
from flux_engine.compiling import Graphs
from flux_engine.errors import OutOfMemory
from flux_engine.families.base import channels_last
from flux_engine.families.flux import image_ids
from flux_engine.footprint import DTYPES
from flux_engine.models.flux import Flux
from flux_engine.models.layers import Runner, directly
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.plan import said
from flux_engine.quantization.linears import QuantizedLinear
from flux_engine.quantization.policy import treatment
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec
from flux_engine.work import Work

BLOCK = 2**20
"""Random numbers that are drawn, and repeated: drawing as many as FLUX.1 has takes minutes."""
SDXL_TOKENS = 77


@dataclass(frozen=True)
class Size:
    """How large a call is."""

    width: int
    height: int
    batch: int = 1
    """Rows: two for each picture where there is classifier-free guidance."""
    steps: int = 4


@dataclass(frozen=True)
class Network:
    """A network with what it reads. Frozen for one size."""

    net: nn.Module
    prompt: Callable[[], Any]
    """What is done once for a prompt and schedule; gives statics."""
    once: Callable[[int, Any], Tensor]
    """Call number and statics -> prediction."""


def work_of_step(spec: ModelSpec, size: Size, *, decoding: bool = False) -> Work:
    """The arithmetic of one call of a model's network, or of its autoencoder."""
    h, w = size.height // spec.vae.downscale, size.width // spec.vae.downscale
    if decoding:
        return work.decode(spec.vae, h=h, w=w, batch=size.batch)
    if isinstance(spec, FluxSpec):
        return work.flux_step(spec.transformer, image=h * w // 4, text=spec.max_sequence_length, batch=size.batch)
    assert isinstance(spec, SDXLSpec)
    return work.unet_step(spec.unet, h=h, w=w, text=SDXL_TOKENS, batch=size.batch)


def sizes_for(spec: ModelSpec, size: Size, *, decoding: bool = False) -> Sizes:
    """What most of a step's arithmetic is made of, for the ceilings."""
    h, w = size.height // spec.vae.downscale, size.width // spec.vae.downscale
    if decoding:  # the widest channels where there are most positions of them
        widest = spec.vae.channels * spec.vae.channel_multipliers[-1]
        return Sizes(channels=widest, h=4 * h, w=4 * w, heads=1, length=h * w, head_dim=widest)
    if isinstance(spec, FluxSpec):
        net = spec.transformer
        length = h * w // 4 + spec.max_sequence_length
        head_dim = net.hidden_size // net.num_heads
        return Sizes(length * size.batch, net.hidden_size, net.num_heads * size.batch, length, head_dim)
    assert isinstance(spec, SDXLSpec)
    net = spec.unet
    below = 2 ** (len(net.block_out_channels) - 1)
    deepest, wide = net.block_out_channels[-1], net.block_out_channels[-2]
    length = 4 * h * w // below**2  # attention is dearest where there are most positions of it
    return Sizes(
        tokens=max(1, size.batch * h * w // below**2), width=deepest, heads=size.batch * wide // net.head_dim,
        length=length, head_dim=net.head_dim, channels=wide, h=2 * h // below, w=2 * w // below,
    )  # fmt: skip


def with_depth(spec: ModelSpec, depth: tuple[int, int] | None) -> ModelSpec:
    """FLUX.1 with so many double and single blocks."""
    if depth is None or not isinstance(spec, FluxSpec):
        return spec
    return replace(spec, transformer=replace(spec.transformer, depth=depth[0], depth_single_blocks=depth[1]))


def make(
    spec: ModelSpec,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str,
    *,
    decoding: bool = False,
    graphs: Graphs | None = None,
) -> Network:
    """The network of a model, or its autoencoder, as it is or by `graphs`. Raises OutOfMemory, before any number is
    drawn, for one that does not fit."""
    with torch.device("meta"):
        if decoding:
            net: Any = AutoEncoder(spec.vae).decoder
        elif isinstance(spec, FluxSpec):
            net = Flux(spec.transformer)
        else:
            assert isinstance(spec, SDXLSpec)
            net = UNet(spec.unet)
    kind = None if decoding else "flux" if isinstance(spec, FluxSpec) else "unet"
    treat = treatment(kind, scheme) if kind else None
    small = {name: kept for name, module in net.named_modules() if isinstance(module, nn.Linear)
             and treat is not None and (kept := treat(name))}  # fmt: skip
    item = DTYPES[str(dtype).removeprefix("torch.")]
    needed = sum(p.numel() * (1 if name.removesuffix(".weight") in small else item)
                 for name, p in net.named_parameters())  # fmt: skip
    room = hardware.card_of(device).memory
    if needed > room:
        raise OutOfMemory(
            f"{spec.name}'s weights take {said(needed)} in {scheme if small else dtype}, and {said(room)} are free: "
            "take fewer blocks (--depth 2+4), or --quantization int8"
        )
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(BLOCK, generator=generator, device=device)
    for name, module in list(net.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, _filled(parameter, leaf, numbers, dtype))
        if name in small:
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, QuantizedLinear.of(module, small[name]))
    net.eval()
    if not isinstance(net, Flux):
        channels_last(net)
    if graphs is not None:
        graphs.attach([net])
    return _fed(net, spec, size, device, dtype, graphs.call if graphs else directly)


def _filled(parameter: Tensor, leaf: str, numbers: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Matrices that keep what passes through them as large as it is; norms that change nothing, and no biases."""
    if parameter.dim() < 2:
        fill = torch.zeros if leaf == "bias" else torch.ones
        return nn.Parameter(fill(parameter.shape, dtype=dtype, device=numbers.device), requires_grad=False)
    few = (numbers / math.sqrt(parameter[0].numel())).to(dtype)
    count = parameter.numel()
    return nn.Parameter(few.repeat(-(-count // len(few)))[:count].view(parameter.shape), requires_grad=False)


def _fed(
    net: Any, spec: ModelSpec, size: Size, device: torch.device, dtype: torch.dtype, call_decoder: Runner
) -> Network:
    h, w, B = size.height // spec.vae.downscale, size.width // spec.vae.downscale, size.batch
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    times = torch.linspace(1, 0, size.steps + 1, device=device)[:-1]
    if isinstance(net, Flux):
        params, tokens = net.params, random(B, h * w // 4, net.params.in_channels)
        context, pooled = random(B, _text(spec), params.context_in_dim), random(B, params.vec_in_dim)
        ids = image_ids(h // 2, w // 2).to(device)
        guidance = torch.full((B,), 3.5, device=device) if params.guidance_embed else None
        return Network(
            net,
            lambda: net.precompute(context, pooled, ids, times, guidance),
            lambda call, statics: net(tokens, call, statics),
        )
    latent = random(B, spec.vae.latent_channels, h, w)
    if not isinstance(net, UNet):
        latent = latent.to(dtype)
        return Network(net, lambda: None, lambda call, statics: call_decoder(net, latent))
    context, params = random(B, SDXL_TOKENS, net.params.cross_attention_dim), net.params
    time_ids = torch.tensor([[size.height, size.width, 0, 0, size.height, size.width]] * B, device=device).float()
    pooled = random(B, params.add_embed_dim - time_ids.shape[1] * 256)
    guidance = torch.full((B,), 8.0, device=device) if params.guidance_embed else None
    return Network(
        net,
        lambda: net.precompute(context, pooled, time_ids, times * 999, guidance),
        lambda call, statics: net(latent, call, statics),
    )


def _text(spec: ModelSpec) -> int:
    assert isinstance(spec, FluxSpec)
    return spec.max_sequence_length
