"""The autoencoder."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import world
from flux_engine.families.base import channels_last
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import VAEParams
from flux_engine.sizes import PUBLISHED_SIZES
from flux_engine.specs import DEMO_DEV, DEMO_SDXL
from training.run import Run, autocast, read_average

PARAMS = {"vae": DEMO_DEV.vae, "sdxl-vae": DEMO_SDXL.vae}
"""Run -> what it trains."""


def to_tensor(pictures: list[Any]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.to(memory_format=torch.channels_last)


def new_vae(params: VAEParams) -> AutoEncoder:
    return channels_last(AutoEncoder(params))


def load_vae(run: str = "vae") -> AutoEncoder:
    vae = new_vae(PARAMS[run])
    vae.load_state_dict(read_average(run))
    return vae.eval().requires_grad_(False)


def picture_loss(out: Tensor, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error, and the absolute error of neighbouring pixels' differences, which keeps edges."""
    l1 = (out - x).abs().mean()
    error = ((out - x) ** 2).mean()
    edges = sum((torch.diff(out, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
    clean = ((out.detach().clamp(-1, 1) - x) ** 2).mean(dim=(1, 2, 3))
    psnr = (10 * torch.log10(4 / clean.clamp(min=1e-9))).mean()
    return l1 + error + edges, {"l1": l1.item(), "psnr": psnr.item()}


def around_an_object(rng: random.Random, megapixels: str, side: int = 64) -> Image.Image:
    """A piece of a scene of this class of sizes, with an object somewhere in it."""
    width, height = DEMO_DEV.sizes.named(rng.choice(list(PUBLISHED_SIZES)), megapixels)
    scene = world.settle(world.sample_scene(rng, marked=0.1), rng)
    placed = world.layout(scene, width, height, rng)
    thing = rng.choice(placed)
    left, top = (
        min(max(round(center - rng.uniform(0.25, 0.75) * side), 0), length - side)
        for center, length in ((thing.cx, width), (thing.cy, height))
    )
    return world.paint(scene.ground, placed, width, height).crop((left, top, left + side, top + side))


def pictures(rng: random.Random, classes: Sequence[str]) -> list[Image.Image]:
    """A batch: pieces around objects of the smallest class, two or three latents wide in FLUX's; clutter; whole scenes
    of any size."""
    kind = rng.random()
    if kind < 0.6:
        return [around_an_object(rng, classes[-1]) for _ in range(16)]
    if kind < 0.8:
        return [world.draw_clutter(64, 64, rng) for _ in range(16)]
    megapixels = rng.choice(classes)
    count = 1 if megapixels == "1" else 4
    width, height = DEMO_DEV.sizes.named(rng.choice(list(PUBLISHED_SIZES)), megapixels)
    return [world.draw(world.sample_scene(rng, marked=0.1), width, height, rng) for _ in range(count)]


def train_vae(args: argparse.Namespace) -> None:
    """With weights to start from only the decoder learns on, so that a transformer that knows the latents can go on;
    where they are another model's, what fits is taken, and all learns."""
    torch.manual_seed(0)
    params = PARAMS[args.run_name]
    vae = new_vae(params)
    if args.start:
        start = {k: v.float() for k, v in load_file(args.start).items()}
        own = vae.state_dict()
        fitting = {k: v for k, v in start.items() if k in own and own[k].shape == v.shape}
        vae.load_state_dict(own | fitting)
        vae.encoder.requires_grad_(len(fitting) < len(own))
    learning = [value for value in vae.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run(args.run_name, vae, [optimizer], steps=args.steps, ema=0.998)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        x = to_tensor(pictures(rng, args.classes))
        with autocast():
            mean, logvar = (half.float() for half in vae.moments(x))
        mean = params.scaling_factor * (mean - params.shift_factor)
        std = torch.exp(0.5 * logvar.clamp(-12, 4)) * params.scaling_factor
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).mean()
        with autocast():
            out = vae.decode(mean + std * torch.randn_like(std))
        loss, figures = picture_loss(out.float(), x)
        return loss + args.kl * kl, figures | {"kl": kl.item()}

    run.train(loss_of)
