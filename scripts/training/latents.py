"""Pictures as latents and captions as encoded text, kept on disk: a transformer's training runs nothing else."""

from __future__ import annotations

import argparse
import random
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks import captions, world
from benchmarks.world import Ground, Placed, Scene, Thing
from flux_engine.sizes import PUBLISHED_SIZES
from flux_engine.specs import DEMO_DEV
from training.run import OUT, autocast, log
from training.text import load_text
from training.vae import load_vae, to_tensor

CELL = 4
"""Pixels along the side of a cell of the coverage maps."""
CAPTIONS = 3
"""Captions written for every picture."""


def sizes(megapixels: str) -> list[tuple[int, int]]:
    """Every (width, height) of a class of the demo's size table."""
    return [DEMO_DEV.sizes.named(ratio, megapixels) for ratio in PUBLISHED_SIZES]


LAYOUTS = ("middle", "free")
"""How what a caption leaves open is drawn in the pictures of a pool: an object in the middle of where it may be, of
middle size, and to the left of the other; or anyhow."""


class Middle(random.Random):
    """Takes the middle of every range."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def arrange(scene: Scene, layout: str, width: int, height: int, rng: random.Random) -> tuple[Scene, list[Placed]]:
    """Nothing left open, and where the objects go."""
    if layout == "free":
        settled = world.settle(scene, rng)
        return settled, world.layout(settled, width, height, rng)
    settled = world.settle(replace(scene, relation=scene.relation or "left of"), rng)
    return settled, world.layout(settled, width, height, Middle())


@dataclass
class Pool:
    """Scenes of one picture size with their latents."""

    width: int
    height: int
    scenes: list[Scene]
    latents: Tensor
    """(N, C, h, w), float16."""
    coverage: Tensor
    """(N, 3, H / CELL, W / CELL), uint8: how much of a cell the first object, the second object and the background's
    second colour cover."""
    boxes: Tensor
    """(N, 2, 4), float32: left, top, right, bottom of the objects in pixels; all zero for none."""


def coverage_maps(scene: Scene, placed: list[Placed], width: int, height: int) -> np.ndarray:
    maps = np.zeros((3, height // CELL, width // CELL), np.uint8)
    for number, thing in enumerate(placed):
        canvas = Image.new("L", (width, height))
        ImageDraw.Draw(canvas).polygon(world.outline(thing.shape, thing.cx, thing.cy, thing.radius), fill=255)
        maps[number] = np.asarray(canvas.reduce(CELL))
    ground = scene.ground
    if ground.kind != "plain":
        two = Ground(ground.kind, "black", "white", ground.axis)
        maps[2] = np.asarray(world.paint_ground(two, width, height).convert("L").reduce(CELL))
    return maps


def boxes_of(placed: list[Placed]) -> list[list[float]]:
    """Of two objects, left, top, right, bottom in pixels; zeros for one that is not there."""
    boxes = [[p.cx - p.radius, p.cy - p.radius, p.cx + p.radius, p.cy + p.radius] for p in placed]
    return [*boxes, [0.0] * 4][:2]


def make_pool(width: int, height: int, count: int, layout: str, vae: Any) -> Pool:
    rng = random.Random(f"latents-{layout}-{width}x{height}")
    scenes: list[Scene] = []
    latents: list[Tensor] = []
    maps: list[np.ndarray] = []
    boxes: list[list[list[float]]] = []
    with torch.inference_mode(), autocast():
        while len(scenes) < count:
            pictures: list[Image.Image] = []
            for _ in range(4):  # more would leave the cache
                scene = world.sample_scene(rng, marked=0.05)
                settled, placed = arrange(scene, layout, width, height, rng)
                pictures.append(world.paint(settled.ground, placed, width, height))
                maps.append(coverage_maps(settled, placed, width, height))
                boxes.append(boxes_of(placed))
                scenes.append(scene)
            latents.append(vae.encode(to_tensor(pictures)).contiguous().half())
    return Pool(width, height, scenes, torch.cat(latents), torch.from_numpy(np.stack(maps)), torch.tensor(boxes))


@dataclass
class Texts:
    """Encoded captions of a pool's pictures."""

    tokens: Tensor
    """T5's tokens (N, CAPTIONS, L, D), float16."""
    pooled: Tensor
    """CLIP's pooled vectors (N, CAPTIONS, D), float16."""


def path_of(layout: str, size: tuple[int, int], kind: str = "latents", vae: str = "vae") -> Path:
    """`vae` is the run that trained the autoencoder whose latents they are."""
    folder = OUT / "pools" / ("" if vae == "vae" else vae)
    return folder / f"{layout}-{size[0]}x{size[1]}.{kind}.pt"


def make_latents(args: argparse.Namespace) -> None:
    vae = load_vae(args.vae)
    for width, height in dict.fromkeys(sizes(args.megapixels)):
        path = path_of(args.layout, (width, height), vae=args.vae)
        if not path.exists():
            pool = make_pool(width, height, args.count * (2 if width == height else 1), args.layout, vae)
            keep(path, vars(pool) | {"scenes": [astuple(scene) for scene in pool.scenes]})
            log.info("%dx%d: %d pictures, std %.3f", width, height, len(pool.scenes), pool.latents.float().std())


def make_texts(args: argparse.Namespace) -> None:
    """Write and encode captions for every pool there is."""
    text = load_text()
    for layout, size in product(LAYOUTS, sizes("1") + sizes("0.25")):
        if path_of(layout, size, "texts").exists() or not path_of(layout, size).exists():
            continue
        rng = random.Random(f"texts-{layout}-{size[0]}x{size[1]}")
        scenes = load_pool(layout, size).scenes
        written = [captions.write(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
        parts: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            for start in range(0, len(written), 64):
                tokens, pooled = text(written[start : start + 64])
                parts.append((tokens.half(), pooled.half()))
        tokens, pooled = (torch.cat(column).unflatten(0, (-1, CAPTIONS)) for column in zip(*parts, strict=True))
        keep(path_of(layout, size, "texts"), {"tokens": tokens, "pooled": pooled})


def keep(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def load_pool(layout: str, size: tuple[int, int], vae: str = "vae") -> Pool:
    kept = torch.load(path_of(layout, size, vae=vae), weights_only=True)
    kept["scenes"] = [
        Scene(tuple(Thing(*thing) for thing in things), Ground(*ground), relation)
        for things, ground, relation in kept["scenes"]
    ]
    return Pool(**kept)


def load_texts(layout: str, size: tuple[int, int]) -> Texts:
    return Texts(**torch.load(path_of(layout, size, "texts"), weights_only=True))
