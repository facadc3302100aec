"""demo-fill: demo-schnell, which reads a picture with a hole, and the hole's mask, beside the latent.

Only what reads them and the double blocks learn, so that it draws as well as before; the rest is demo-schnell's file.
Pictures with objects anywhere, and captions of all that they show. Holes are around an object, anywhere, or all of one
side, as outpainting has them: what is to be seen already is not to be drawn again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pixel_unshuffle

from benchmarks import world
from benchmarks.world import Placed, Scene
from flux_engine.models.flux import Flux, patchify
from flux_engine.specs import DEMO_FILL
from training.batches import Batch, evenly
from training.control import any_size, how_many, learn, shown
from training.flux import in_a_block, optimizers_of, use_faster_operations
from training.latents import boxes_of
from training.run import Run, autocast, read_average
from training.text import load_text
from training.vae import load_vae, to_tensor


@dataclass
class Holed(Batch):
    """A batch with what is read beside the latent."""

    beside: Tensor
    """(B, L, 320): the picture with the hole, and the pixels of the mask."""


def hole(placed: list[Placed], width: int, height: int, rng: random.Random) -> Image.Image:
    """White where the picture is to be filled."""
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    kind = rng.random()
    if kind < 0.6:
        side, share = rng.randrange(4), rng.uniform(0.2, 0.6)
        across, along = round(width * share), round(height * share)
        boxes = ((0, 0, across, height), (width - across, 0, width, height),
                 (0, 0, width, along), (0, height - along, width, height))  # fmt: skip
        pen.rectangle(boxes[side], fill=255)
        return mask
    if kind < 0.9:
        thing = rng.choice(placed)
        x, y, reach = thing.cx, thing.cy, thing.radius * rng.uniform(1.05, 1.6)
    else:
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), min(width, height) * rng.uniform(0.1, 0.4)
    box = (x - reach, y - reach, x + reach, y + reach)
    (pen.ellipse if rng.random() < 0.4 else pen.rectangle)(box, fill=255)
    return mask


class Source:
    """Batches of pictures with holes, drawn and encoded as they are needed: of a few thousand kept ones too few had the
    same side missing."""

    def __init__(self, count: int) -> None:
        self.count, self.vae, self.encode = count, load_vae("vae"), load_text()

    def draw(self, rng: random.Random, level: Callable[[random.Random], float], **_: Any) -> Holed:
        width, height = size = any_size(rng)
        scenes: list[Scene] = []
        pictures: list[Image.Image] = []
        masks: list[np.ndarray[Any, Any]] = []
        boxes: list[list[list[float]]] = []
        while len(scenes) < how_many(self.count, size):
            scene = world.sample_scene(rng)
            settled = world.settle(scene, rng)
            placed = world.layout(settled, width, height, rng)
            scenes.append(scene)
            pictures.append(world.paint(settled.ground, placed, width, height))
            masks.append(np.asarray(hole(placed, width, height, rng)) > 127)
            boxes.append(boxes_of(placed))
        whole = to_tensor(pictures)
        mask = torch.from_numpy(np.stack(masks))[:, None].float()
        with torch.no_grad():
            latents, kept = self.vae.encode(torch.cat((whole, whole * (1 - mask)))).chunk(2)
        common = shown(scenes, latents, torch.tensor(boxes), size, level, self.encode, rng)
        # What is outside of the hole is given away, so what is inside counts more.
        weight = common["weight"] * (0.2 + patchify(max_pool2d(mask, 8)).mean(dim=2))
        common["weight"] = weight / weight.mean(dim=1, keepdim=True)
        return Holed(**common, beside=patchify(torch.cat((kept, pixel_unshuffle(mask, 8)), dim=1)))


OWN = ("img_in.", "double_blocks.")
"""What is not demo-schnell's."""


def new_fill() -> Flux:
    """demo-schnell, which reads nothing of the picture yet."""
    told = read_average("demo-schnell", "flux.")
    net = Flux(DEMO_FILL.transformer)
    wide = torch.zeros_like(net.img_in.weight)
    wide[:, : told["img_in.weight"].shape[1]] = told["img_in.weight"]
    net.load_state_dict(told | {"img_in.weight": wide})
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(OWN))
    return net


def train_fill(args: argparse.Namespace) -> None:
    use_faster_operations()
    torch.manual_seed(10)
    net = new_fill()
    own = nn.ModuleDict({"img_in": net.img_in, "double_blocks": net.double_blocks})
    run = Run("demo-fill", own, optimizers_of(own, args.lr, in_a_block), steps=args.steps, ema=0.99)

    def predict(x: Tensor, batch: Any) -> Tensor:
        with autocast():
            told = net.precompute(batch.tokens, batch.pooled, batch.positions, batch.t[None], None)
            return net(torch.cat((x, batch.beside), dim=2), 0, told).float()

    learn(run, predict, Source(args.batch), [evenly(steps) for steps in (2, 4)])
