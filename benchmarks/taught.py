"""What LoRAs trained on the drawn world have taught: a new word, a style, few steps. By the oracle.

python -m benchmarks.taught [--count 100] [--seed 2024] [--only word style style-sdxl lcm]

`word`: prompts whose first object is a zorblin, which no base has seen; right is a picture that shows everything that
the prompt says. `style`: how much haze lies over a picture, against the same without the LoRA, of the amount that the
training showed, and whether it shows what is asked for once the haze is taken off. `lcm`: demo-sdxl in 4 steps without
guidance, and the haze beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import flux_engine
from benchmarks import captions, oracle, world
from benchmarks.adherence import scenes
from flux_engine import Engine, LoRA

FOLDER = Path(__file__).resolve().parent.parent / "weights" / "demo" / "loras"
TAUGHT = (world.TAUGHT_SHAPE,)
STEPS = 8
"""Of demo-dev, fewer than its 28: there are many pictures to draw."""


@dataclass(frozen=True)
class Asked:
    """What a picture was asked for."""

    scene: world.Scene
    caption: str
    seed: int


def of_the_word(count: int, seed: int) -> list[Asked]:
    """Scenes whose first object is the taught shape."""
    asked: list[Asked] = []
    for number, (scene, _) in enumerate(islice(scenes(seed), count)):
        first = replace(scene.things[0], shape=world.TAUGHT_SHAPE)
        scene = replace(scene, things=(first, *scene.things[1:]))
        asked.append(Asked(scene, captions.write(scene, random.Random(f"{seed} {number}")), seed + number))
    return asked


def of_the_world(count: int, seed: int) -> list[Asked]:
    """As `benchmarks.adherence` asks."""
    return [Asked(scene, caption, seed + n) for n, (scene, caption) in enumerate(islice(scenes(seed), count))]


def draw(engine: Engine, asked: Sequence[Asked], **fields: Any) -> list[Image.Image]:
    """A picture of each."""
    return [engine(each.caption, seed=each.seed, **fields).image for each in asked]


def share(asked: Sequence[Asked], pictures: Sequence[Image.Image]) -> float:
    """Of pictures that show everything."""
    right = [
        all(oracle.judge(picture, each.scene, also=TAUGHT).values())
        for each, picture in zip(asked, pictures, strict=True)
    ]
    return sum(right) / len(right)


def haze(pictures: Sequence[Image.Image], plain: Sequence[Image.Image]) -> float:
    """How much haze lies over pictures, against the same without, by least squares over all pixels; 1 is what the
    training showed."""
    above = below = 0.0
    for picture, other in zip(pictures, plain, strict=True):
        to_haze = np.array(world.HAZE, float) - np.asarray(other, float)
        above += float(((np.asarray(picture, float) - np.asarray(other, float)) * to_haze).sum())
        below += float((to_haze**2).sum())
    return above / below / world.VEIL


def without_haze(pictures: Sequence[Image.Image], amount: float = 1.0) -> list[Image.Image]:
    """The pictures as they would be without so much of it."""
    return [world.unveil(picture, amount * world.VEIL) for picture in pictures]


def file_of(name: str, kind: str = "") -> Path:
    """A LoRA that ships, as PEFT names weights, or "-kohya"."""
    return FOLDER / f"{name}{kind}.safetensors"


def word(count: int, seed: int, schemes: Sequence[str] = ("none", "int8", "fp8")) -> dict[str, float]:
    """Share of right pictures with the LoRA merged at scale 1, by precision; beside the weights; without it; and on
    demo-schnell, for which it was not trained."""
    asked = of_the_word(count, seed)
    shares: dict[str, float] = {}
    for scheme in schemes:
        engine = flux_engine.load("demo-dev", quantization=scheme, dtype="bfloat16")
        if scheme == "none":
            shares["without"] = share(asked, draw(engine, asked, num_inference_steps=STEPS))
        for how in ("merge", "side"):
            engine.lora.set([LoRA(file_of("demo-dev-zorblin"))], how=how)
            shares[f"{scheme} {how}"] = share(asked, draw(engine, asked, num_inference_steps=STEPS))
    engine = flux_engine.load("demo-schnell", loras=[file_of("demo-dev-zorblin")])
    return shares | {"demo-schnell": share(asked, draw(engine, asked))}


def style(model: str, count: int, seed: int, **fields: Any) -> dict[str, float]:
    """How much of the style shows, at scales, and what the pictures show through it."""
    engine = flux_engine.load(model)
    asked = of_the_world(count, seed)
    plain = draw(engine, asked, **fields)
    shares = {"plain right": share(asked, plain)}
    for scale in (0.0, 0.5, 1.0):
        engine.lora.set([LoRA(file_of(f"{model}-haze"), scale)])
        pictures = draw(engine, asked, **fields)
        amount = haze(pictures, plain)
        shares |= {f"haze at {scale:g}": amount, f"right at {scale:g}": share(asked, without_haze(pictures, amount))}
    return shares


def lcm(count: int, seed: int) -> dict[str, float]:
    """4 steps without guidance: with the LoRA and the scheduler it brings; with that scheduler alone; and with haze."""
    engine = flux_engine.load("demo-sdxl")
    asked = of_the_world(count, seed)
    plain: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}
    shares = {
        "without, its scheduler": share(asked, draw(engine, asked, scheduler="LCM", **plain)),
        "without, the model's": share(asked, draw(engine, asked, **plain)),
        "without, 2 steps": share(asked, draw(engine, asked, scheduler="LCM", **plain | {"num_inference_steps": 2})),
    }
    engine.lora.set([file_of("demo-sdxl-lcm")])
    alone = draw(engine, asked)
    shares |= {"with": share(asked, alone), "2 steps": share(asked, draw(engine, asked, num_inference_steps=2))}
    engine.lora.set([file_of("demo-sdxl-lcm"), file_of("demo-sdxl-haze")])
    pictures = draw(engine, asked)
    return shares | {"haze beside it": haze(pictures, alone), "right beside it": share(asked, without_haze(pictures))}


MEASURES: dict[str, Callable[[int, int], dict[str, float]]] = {
    "word": word,
    "style": lambda count, seed: style("demo-dev", count, seed, num_inference_steps=STEPS),
    "style-sdxl": lambda count, seed: style("demo-sdxl", count, seed),
    "lcm": lcm,
}


def main() -> None:
    """Command line; ends in a JSON line for each measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    args = parser.parse_args()
    for name in args.only:
        figures = {what: round(value, 3) for what, value in MEASURES[name](args.count, args.seed).items()}
        sys.stdout.write(json.dumps({"measure": name, "count": args.count, "seed": args.seed} | figures) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
