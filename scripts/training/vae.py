"""The autoencoder: trained whole, then its decoder alone."""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import world
from flux_engine.models.vae import AutoEncoder
from flux_engine.specs import DEMO_DEV
from training.run import ROOT, Run, read_average

PARAMS = DEMO_DEV.vae


def to_tensor(pictures: list[Any]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.to(memory_format=torch.channels_last)


def new_vae() -> AutoEncoder:
    return nn.Module.to(AutoEncoder(PARAMS), memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def load_vae() -> AutoEncoder:
    vae = new_vae()
    vae.load_state_dict(read_average("vae"))
    return vae.eval().requires_grad_(False)


def any_scene(rng: random.Random) -> world.Scene:
    return world.sample_scene(rng, marked=0.1)


def picture_loss(out: Tensor, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error, and the absolute error of neighbouring pixels' differences, which keeps edges."""
    l1 = (out - x).abs().mean()
    error = ((out - x) ** 2).mean()
    edges = sum((torch.diff(out, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
    clean = ((out.detach().clamp(-1, 1) - x) ** 2).mean(dim=(1, 2, 3))
    psnr = (10 * torch.log10(4 / clean.clamp(min=1e-9))).mean()
    return l1 + error + edges, {"l1": l1.item(), "psnr": psnr.item()}


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    vae = new_vae()
    if args.start:
        vae.load_state_dict({k: v.float() for k, v in load_file(ROOT / args.start).items()})
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run("vae", vae, [optimizer], steps=args.steps, ema=0.998)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        side, count = rng.choice(((64, 16), (128, 4)))
        x = to_tensor(
            [
                world.draw_clutter(side, side, rng)
                if rng.random() < 0.4
                else world.draw(any_scene(rng), side, side, rng)
                for _ in range(count)
            ]
        )
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = (half.float() for half in vae.moments(x))
        mean = PARAMS.scaling_factor * (mean - PARAMS.shift_factor)
        std = torch.exp(0.5 * logvar.clamp(-12, 4)) * PARAMS.scaling_factor
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).mean()
        with torch.autocast("cpu", torch.bfloat16):
            out = vae.decode(mean + std * torch.randn_like(std))
        loss, figures = picture_loss(out.float(), x)
        return loss + args.kl * kl, figures | {"kl": kl.item()}

    run.train(loss_of)


def train_decoder(args: argparse.Namespace) -> None:
    """Sharpen the decoder. The encoder stays, and so do the latents made with it."""
    vae = load_vae()
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run("decoder", vae.decoder, [optimizer], steps=args.steps, ema=0.998)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        side, count = rng.choice(((256, 2), (128, 8), (128, 8)))
        x = to_tensor([world.draw(any_scene(rng), side, side, rng) for _ in range(count)])
        with torch.no_grad():
            z = vae.encode(x)
        # A transformer's latents are never quite an encoder's: learn to forgive a little.
        noise = rng.choice((0.0, 0.05, 0.15)) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            out = vae.decode(z + noise)
        loss, figures = picture_loss(out.float(), x)
        return loss, figures | {"side": side}

    run.train(loss_of)
