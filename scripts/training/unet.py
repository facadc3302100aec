"""The UNets: a base that predicts v, and from it one for few steps.

They learn as the FLUX transformers do: in flow time t, where a picture with noise is (1 - t) picture + t noise, on the
same batches, asked the same on the way. Only here is a latent put as SDXL has it: divided by its standard deviation,
with the discrete timestep of its noise.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import _muon

import flux_engine.models.unet
from flux_engine.families.flux import patchify, unpatchify
from flux_engine.hardware import has_bf16
from flux_engine.models.unet import UNet
from flux_engine.schedulers import Diffusers, sigma_at
from flux_engine.specs import DEMO_DEV, DEMO_SDXL, DEMO_SDXL_TURBO, SDXLSpec
from training import hints
from training.batches import Batch, Source, Walks, noise_level
from training.flux import error_of, explicit_attention, guided, orthogonal
from training.run import Run, autocast, read_average
from training.text import load_paired

PARAMS = DEMO_SDXL.unet
FIRST_TIMESTEPS = (900.0, 999.0)
"""Where a sampler may begin: what it calls pure noise has a timestep from here."""


def log_sigmas() -> Tensor:
    """Logarithm of noise over signal at every discrete timestep."""
    schedule = DEMO_SDXL.schedule
    roots = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_train_timesteps)
    kept = torch.cumprod(1 - roots.double() ** 2, dim=0)
    return (((1 - kept) / kept).log() / 2).float()


LOG_SIGMAS = log_sigmas()


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


def optimizers_of(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest, convolutions among it."""
    if not has_bf16(torch.device("cpu")):
        _muon._zeropower_via_newtonschulz = orthogonal
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in net.named_parameters():
        inside = ".attentions." in name and value.ndim == 2
        (hidden if inside else rest).append(value)
    return [
        torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def new_unet() -> UNet:
    unet = UNet(PARAMS)
    with torch.no_grad():
        for key, value in unet.named_parameters():
            if key.endswith(("conv2.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight")):
                value.mul_(0.3)
            if key.startswith("conv_out"):
                value.mul_(0.1)
    return nn.Module.to(unet, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def source_of(args: argparse.Namespace, **options: Any) -> Source:
    return Source(args.batch, args.large, vae="sdxl-vae", encode=load_paired(), **options)


def train_base(args: argparse.Namespace) -> None:
    """As the FLUX base: one caption in ten is empty, for guidance; half of a step is pictures with noise, half is where
    the network's own steps lead."""
    flux_engine.models.unet.attention = explicit_attention
    torch.manual_seed(6)
    net = Traced(new_unet())
    if args.start:
        net.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    run = Run("sdxl-base", net, optimizers_of(net, args.lr), steps=args.steps, ema=0.999)
    source = source_of(args, uncaptioned=0.1)
    walks = Walks(source, [walk(DEMO_SDXL, 25), *(walk(DEMO_SDXL_TURBO, steps) for steps in (4, 8, 16))])

    def look(batch: Batch, x: Tensor, walked: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out, facts, edges, drawn = net(x, batch)
        error = error_of(out, batch.velocity(x), batch, walked)
        return out, error, batch.answers.losses(facts, edges, drawn, batch.captioned)

    def total(error: Tensor, told: dict[str, Tensor]) -> Tensor:
        return (error + sum(hints.WEIGHTS[name] * value for name, value in told.items())).mean()

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng, noise_level, free=args.free)
        _, error, told = look(batch, batch.mixed, walked=False)
        loss = total(error, told)
        high = (batch.t > 0.95) & batch.captioned
        figures = {name: value[high].mean().item() for name, value in ({"noise_only": error} | told).items()}
        walk = walks.take(rng)
        out, error, told = look(walk.batch, walk.x, walked=True)
        figures["walked"] = error[walk.batch.settled].mean().item()
        walks.go(walk, out)
        return (loss + total(error, told)) / 2, figures

    run.train(loss_of)


def load_base() -> UNet:
    unet = new_unet()
    unet.load_state_dict(read_average("sdxl-base", "unet."))
    return unet.eval().requires_grad_(False)


def train_turbo(args: argparse.Namespace) -> None:
    """Four steps or fewer, with the guidance inside, as demo-schnell has it."""
    flux_engine.models.unet.attention = explicit_attention
    torch.manual_seed(7)
    teacher, pupil = Traced(load_base()), Traced(load_base().requires_grad_(True).train())
    run = Run("demo-sdxl-turbo", pupil, optimizers_of(pupil.unet, args.lr), steps=args.steps, ema=0.99)
    source = source_of(args, guidance=lambda _: DEMO_DEV.guidance_scale or 1.0)
    plans = [walk(DEMO_SDXL_TURBO, steps) for steps in (2, 4)]
    guided(run, pupil.velocity, teacher.velocity, source, plans)
