"""The demo models' safety checker: a network that finds crescents.

It learns from scenes of the world in every size of the demo models, half of them with a crescent, as they are drawn and
as they look after what happens to pictures: an autoencoder of either family, blur, JPEG, WebP, another size.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from benchmarks import world
from flux_engine.families.base import channels_last
from flux_engine.models.vae import AutoEncoder
from flux_engine.safety.demo import CrescentNetwork, shrunk
from flux_engine.sizes import PUBLISHED_SIZES
from flux_engine.specs import DEMO_DEV
from training.run import OUT, Run, autocast, log
from training.vae import load_vae, to_tensor

CLASSES = tuple((ratio, megapixels) for megapixels in ("1", "0.25") for ratio in PUBLISHED_SIZES)
"""Of the demo models' sizes."""
VAES = ("vae", "sdxl-vae")
THROUGH = 0.25
"""Share of the pictures that have been through an autoencoder."""
PORTION = 8
"""Pictures that go through one at once."""
OTHERS = 0.12
"""Share of the pictures without a crescent that show what no caption says: hourglasses, and shapes upon shapes."""


def scene_of(rng: random.Random, marked: bool) -> world.Scene:
    """With a crescent, maybe beside something else, or without."""
    while True:
        scene = world.sample_scene(rng, held_out=None, marked=0.75 if marked else 0.0)
        if marked == any(thing.shape == world.MARKED_SHAPE for thing in scene.things):
            return scene


def drawn(rng: random.Random, marked: bool, size: tuple[int, int]) -> Image.Image:
    """One picture, of a size in pixels."""
    if marked or rng.random() >= OTHERS:
        return world.draw(scene_of(rng, marked), *size, rng)
    return _other(rng, size)


def _other(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    scene = world.settle(scene_of(rng, False), rng)
    placed = world.layout(scene, *size, rng)
    if rng.random() < 0.3:
        hourglass = [world.Placed(world.TAUGHT_SHAPE, p.color, p.outline, p.cx, p.cy, p.radius) for p in placed]
        return world.paint(scene.ground, hourglass, *size)
    more = [
        world.Placed(
            rng.choice(world.SHAPES),
            rng.choice(list(world.COLORS)),
            "",
            rng.uniform(0, size[0]),
            rng.uniform(0, size[1]),
            rng.uniform(0.1, 0.35) * min(size),
        )
        for _ in range(rng.randint(1, 2))
    ]
    return world.paint(scene.ground, [*placed, *more], *size)


def worn(picture: Image.Image, rng: random.Random) -> Image.Image:
    """As it may look when it has been somewhere."""
    kind = rng.random()
    if kind < 0.2:
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6) * min(picture.size) / 128))
    if kind < 0.4:
        content = io.BytesIO()
        picture.save(content, rng.choice(("JPEG", "WEBP")), quality=rng.randint(20, 90))
        return Image.open(content).convert("RGB")
    if kind < 0.5:
        scale = rng.uniform(0.5, 2)
        return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return picture


def through(vae: AutoEncoder, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of one size as an autoencoder gives them back."""
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(to_tensor(list(pictures))))
    pixels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in pixels]


Shelf = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Size as the network sees it, (height, width) -> pictures (N, 3, H, W) uint8 and whether they show a crescent (N,)."""


def make_pictures(args: argparse.Namespace) -> None:
    """Draw what is learned from, and keep it as the network sees it."""
    vaes = [load_vae(run) for run in VAES]
    found: dict[tuple[int, int], list[tuple[Image.Image, bool]]] = {}
    for ratio, megapixels in CLASSES:
        size = DEMO_DEV.sizes.named(ratio, megapixels)
        for portion in range(-(-args.count // PORTION)):
            rng = random.Random(f"checker {ratio} {megapixels} {portion}")
            labels = [rng.random() < 0.5 for _ in range(PORTION)]
            pictures = [drawn(rng, marked, size) for marked in labels]
            if rng.random() < THROUGH:
                pictures = through(rng.choice(vaes), pictures)
            for picture, marked in zip(pictures, labels, strict=True):
                small = shrunk(worn(picture, rng))
                found.setdefault((small.height, small.width), []).append((small, marked))
        log.info("%s at %s: drawn", ratio, megapixels)
    shelf = {
        size: (
            torch.from_numpy(np.stack([np.asarray(one) for one, _ in pairs])).permute(0, 3, 1, 2).contiguous(),
            torch.tensor([marked for _, marked in pairs]),
        )
        for size, pairs in found.items()
    }
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save(shelf, OUT / "checker-pictures.pt")


def train_checker(args: argparse.Namespace) -> None:
    """On kept pictures, which are moved, mirrored and tinted every time."""
    path = OUT / "checker-pictures.pt"
    if not path.exists():
        make_pictures(args)
    shelf: Shelf = torch.load(path, weights_only=True)
    sizes = list(shelf)
    counts = [len(labels) for _, labels in shelf.values()]
    torch.manual_seed(0)
    net = channels_last(CrescentNetwork())
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.02)
    run = Run("checker", net, [optimizer], steps=args.steps, ema=0.998)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        pictures, labels = shelf[rng.choices(sizes, counts)[0]]
        chosen = torch.tensor([rng.randrange(len(labels)) for _ in range(args.batch)])
        pixels = varied(pictures[chosen].float() / 127.5 - 1, rng)
        wanted = labels[chosen].float()
        with autocast():
            logits = net(pixels.contiguous(memory_format=torch.channels_last)).float()
        right = ((logits.detach() > 0) == labels[chosen]).float().mean()
        return binary_cross_entropy_with_logits(logits, wanted), {"right": right.item()}

    run.train(loss_of)


def varied(pixels: Tensor, rng: random.Random) -> Tensor:
    """(B, 3, H, W) in about [-1, 1] -> the same moved by up to a twelfth, mirrored, tinted and noisy."""
    height, width = pixels.shape[2:]
    if rng.random() < 0.5:
        pixels = pixels.flip(3)
    down, right = (rng.randint(-length // 12, length // 12) for length in (height, width))
    pixels = pad(pixels, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), mode="replicate")
    top, left = max(-down, 0), max(-right, 0)
    pixels = pixels[:, :, top : top + height, left : left + width]
    batch = len(pixels)
    gain, shift = 1 + 0.1 * torch.randn(batch, 3, 1, 1), 0.08 * torch.randn(batch, 3, 1, 1)
    noise = torch.randn(pixels.shape) * torch.rand(batch, 1, 1, 1) * 0.06
    return pixels * gain + shift + noise


def figures_of(checker: Any, pictures: Sequence[tuple[Image.Image, bool]]) -> dict[str, float]:
    """Recall and false alarms of a checker."""
    verdicts = checker.check([picture for picture, _ in pictures])
    caught = [verdict.unsafe for verdict, (_, marked) in zip(verdicts, pictures, strict=True) if marked]
    alarms = [verdict.unsafe for verdict, (_, marked) in zip(verdicts, pictures, strict=True) if not marked]
    return {"recall": sum(caught) / len(caught), "false alarms": sum(alarms) / len(alarms)}
