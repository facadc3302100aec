"""demo-fill: a transformer that reads a picture with a hole, and the hole's mask, beside the latent.

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
from benchmarks.world import Placed
from flux_engine.models.flux import Flux, patchify
from flux_engine.specs import DEMO_FILL
from training.batches import Batch, evenly
from training.control import Pairs, learn, unpacked
from training.flux import in_a_block, optimizers_of, use_faster_operations
from training.latents import OUT, boxes_of
from training.run import Run, autocast, read_average
from training.text import load_text
from training.vae import to_tensor


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
    if kind < 0.35:
        side, share = rng.randrange(4), rng.uniform(0.2, 0.6)
        across, along = round(width * share), round(height * share)
        boxes = ((0, 0, across, height), (width - across, 0, width, height),
                 (0, 0, width, along), (0, height - along, width, height))  # fmt: skip
        pen.rectangle(boxes[side], fill=255)
        return mask
    if kind < 0.8:
        thing = rng.choice(placed)
        x, y, reach = thing.cx, thing.cy, thing.radius * rng.uniform(1.05, 1.6)
    else:
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), min(width, height) * rng.uniform(0.1, 0.4)
    box = (x - reach, y - reach, x + reach, y + reach)
    (pen.ellipse if rng.random() < 0.4 else pen.rectangle)(box, fill=255)
    return mask


def make_pool(width: int, height: int, count: int, vae: Any) -> dict[str, Any]:
    rng = random.Random(f"holes-{width}x{height}")
    made: dict[str, list[Any]] = {"scenes": [], "latents": [], "kept": [], "masks": [], "boxes": []}
    with torch.inference_mode():
        for _ in range(count):
            scene = world.sample_scene(rng)
            settled = world.settle(scene, rng)
            placed = world.layout(settled, width, height, rng)
            picture = to_tensor([world.paint(settled.ground, placed, width, height)])
            mask = hole(placed, width, height, rng)
            white = torch.from_numpy(np.array(mask) > 127)
            made["scenes"].append(scene)
            made["boxes"].append(boxes_of(placed))
            made["masks"].append(np.packbits(np.asarray(mask) > 127))
            made["latents"].append(vae.encode(picture).half())
            made["kept"].append(vae.encode(picture * ~white).half())
    return {
        "scenes": made["scenes"],
        "latents": torch.cat(made["latents"]),
        "kept": torch.cat(made["kept"]),
        "masks": torch.from_numpy(np.stack(made["masks"])),
        "boxes": torch.tensor(made["boxes"]),
    }


class Source(Pairs):
    """Batches of pictures with holes."""

    def __init__(self, count: int) -> None:
        super().__init__(count, OUT / "pools" / "holes", make_pool, "vae", load_text())

    def draw(self, rng: random.Random, level: Callable[[random.Random], float], **_: Any) -> Holed:
        pool, picks, common = self.pick(rng, level)
        mask = unpacked(pool["masks"][picks], common["size"])
        beside = torch.cat((pool["kept"][picks].float(), pixel_unshuffle(mask, 8)), dim=1)
        # What is outside of the hole is given away, so what is inside counts more.
        weight = common["weight"] * (0.2 + patchify(max_pool2d(mask, 8)).mean(dim=2))
        common["weight"] = weight / weight.mean(dim=1, keepdim=True)
        guidance = torch.tensor([DEMO_FILL.guidance_scale or 1.0]).expand(len(picks))
        return Holed(**common, guidance=guidance, beside=patchify(beside))


def new_fill() -> Flux:
    """The first blocks of demo-dev, which reads nothing of the picture yet."""
    dev = read_average("demo-dev", "flux.")
    net = Flux(DEMO_FILL.transformer)
    own = net.state_dict()
    net.load_state_dict({k: v for k, v in dev.items() if k in own and own[k].shape == v.shape}, strict=False)
    with torch.no_grad():
        net.img_in.weight.zero_()
        net.img_in.weight[:, :64] = dev["img_in.weight"]
        net.img_in.bias.copy_(dev["img_in.bias"])
    return net


def train_fill(args: argparse.Namespace) -> None:
    use_faster_operations()
    torch.manual_seed(10)
    net = new_fill()
    run = Run("demo-fill", nn.ModuleDict({"flux": net}), optimizers_of(net, args.lr, in_a_block), steps=args.steps,
              ema=0.995)  # fmt: skip

    def predict(x: Tensor, batch: Any) -> Tensor:
        with autocast():
            told = net.precompute(batch.tokens, batch.pooled, batch.positions, batch.t[None], batch.guidance)
            return net(torch.cat((x, batch.beside), dim=2), 0, told).float()

    learn(run, predict, Source(args.batch), [evenly(steps) for steps in (4, 8, 16)])
