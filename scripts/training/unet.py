"""The UNets: a base that predicts v, and from it one for few steps.

They learn as the FLUX transformers do: in flow time t, where a picture with noise is (1 - t) picture + t noise, on the
same batches, asked the same on the way. Only here is a latent put as SDXL has it: divided by its standard deviation,
with the discrete timestep of its noise.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_engine.families.base import channels_last
from flux_engine.families.flux import patchify, unpatchify
from flux_engine.models.unet import UNet
from flux_engine.schedulers import Diffusers, log_sigmas, sigma_at
from flux_engine.specs import DEMO_DEV, DEMO_SDXL, DEMO_SDXL_TURBO, SDXLSpec
from training import hints
from training.batches import Batch, Source
from training.flux import guided, learn, optimizers_of, use_faster_operations
from training.run import Run, autocast, read_average
from training.text import load_paired

PARAMS = DEMO_SDXL.unet
FIRST_TIMESTEPS = (900.0, 999.0)
"""Where a sampler may begin: what it calls pure noise has a timestep from here."""


LOG_SIGMAS = torch.tensor(log_sigmas(DEMO_SDXL.schedule))
"""Logarithm of noise over signal at every discrete timestep."""


def discrete(t: Tensor) -> tuple[Tensor, Tensor]:
    """Flow times (B,) -> discrete timesteps, as real numbers, and their sigma."""
    wanted = (t / (1 - t).clamp(min=1e-4)).log().clamp(LOG_SIGMAS[0], LOG_SIGMAS[-1])
    above = torch.searchsorted(LOG_SIGMAS, wanted).clamp(1, len(LOG_SIGMAS) - 1)
    low, high = LOG_SIGMAS[above - 1], LOG_SIGMAS[above]
    timestep = above - 1 + (wanted - low) / (high - low)
    a, b = FIRST_TIMESTEPS
    timestep = torch.where(t > 0.999, a + (b - a) * torch.rand_like(t), timestep)
    whole = timestep.long().clamp(max=len(LOG_SIGMAS) - 2)
    return timestep, torch.lerp(LOG_SIGMAS[whole], LOG_SIGMAS[whole + 1], timestep - whole).exp()


def walk(spec: SDXLSpec, steps: int) -> list[float]:
    """The flow times that a sampler stops at, the first of which it takes for pure noise."""
    timesteps = Diffusers(spec.schedule, spec.schedule.scheduler, steps, []).timesteps
    sigmas = [sigma_at(spec.schedule, timestep) for timestep in timesteps]
    return [1.0, *(sigma / (1 + sigma) for sigma in sigmas[1:]), 0.0]


class Traced(nn.Module):
    """A UNet on tokens of flow matching, whose features also tell what they know on the way."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        channels = unet.params.block_out_channels
        self.heads = hints.Heads(channels[2], channels[1], channels[1])
        self.passed: list[Any] = []
        for name in ("up_blocks.0.upsamplers.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.2"):
            module = unet.get_submodule(name)
            module.register_forward_hook(lambda _, __, out: self.passed.append(out.flatten(2).transpose(1, 2)))

    def velocity(self, x: Tensor, batch: Batch) -> Tensor:
        """x (B, L, 4 C) at batch.t -> the flow's velocity there."""
        self.passed.clear()
        width, height = batch.size
        latent = unpatchify(x, height // 8, width // 8)
        timestep, sigma = discrete(batch.t)
        ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(x), -1).float()
        t = batch.t[:, None, None, None]
        scaled = latent / (t**2 + (1 - t) ** 2).sqrt()
        with autocast():
            statics = self.unet.precompute(batch.tokens, batch.pooled, ids, timestep[None])
            v = self.unet(scaled, 0, statics).float()
        length = (1 + sigma**2).sqrt()[:, None, None, None]
        x0 = scaled / length - sigma[:, None, None, None] / length * v
        return (x - patchify(x0)) / batch.t[:, None, None]

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> velocity, facts, edges, drawn."""
        velocity = self.velocity(x, batch)
        heads = (self.heads.facts, self.heads.edges, self.heads.drawn)
        facts, edges, drawn = (head(tokens) for head, tokens in zip(heads, self.passed, strict=True))
        return velocity, facts, edges, drawn


def in_an_attention(name: str) -> bool:
    """Whether a tensor is; the convolutions, most of the rest, are no matrices."""
    return ".attentions." in name


def new_unet() -> UNet:
    unet = UNet(PARAMS)
    with torch.no_grad():
        for key, value in unet.named_parameters():
            if key.endswith(("conv2.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight")):
                value.mul_(0.3)
            if key.startswith("conv_out"):
                value.mul_(0.1)
    return channels_last(unet)


def source_of(args: argparse.Namespace, **options: Any) -> Source:
    return Source(args.batch, args.large, vae="sdxl-vae", encode=load_paired(), **options)


def train_base(args: argparse.Namespace) -> None:
    """As the FLUX base, one caption in ten is empty, for guidance."""
    use_faster_operations()
    torch.manual_seed(6)
    net = Traced(new_unet())
    if args.start:
        net.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    run = Run("sdxl-base", net, optimizers_of(net, args.lr, in_an_attention), steps=args.steps, ema=0.999)
    source = source_of(args, uncaptioned=0.1)
    plans = [walk(DEMO_SDXL, 25), *(walk(DEMO_SDXL_TURBO, steps) for steps in (4, 8, 16))]
    learn(run, net, source, plans, free=args.free)


def load_base() -> UNet:
    unet = new_unet()
    unet.load_state_dict(read_average("sdxl-base", "unet."))
    return unet.eval().requires_grad_(False)


def train_turbo(args: argparse.Namespace) -> None:
    """Four steps or fewer, with the guidance inside, as demo-schnell has it."""
    use_faster_operations()
    torch.manual_seed(7)
    teacher, pupil = Traced(load_base()), Traced(load_base().requires_grad_(True).train())
    run = Run("demo-sdxl-turbo", pupil, optimizers_of(pupil.unet, args.lr, in_an_attention), steps=args.steps, ema=0.99)
    source = source_of(args, guidance=lambda _: DEMO_DEV.guidance_scale or 1.0)
    plans = [walk(DEMO_SDXL_TURBO, steps) for steps in (2, 4)]
    guided(run, pupil.velocity, teacher.velocity, source, plans, args.free)
