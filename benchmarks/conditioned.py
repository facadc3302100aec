"""What pictures that come with a request do, read back by the oracle.

python -m benchmarks.conditioned TASK --model demo-schnell --count 100 --seed 0 [--steps N] [--controlnet KIND=FILE]
    [--plain] [--output SHEET.png]

    repaint   a hole where the object is, and words that ask for another: is it the one asked for?
    keep      the same without pasting back: how far is what the mask keeps from the picture, against the autoencoder?
    outpaint  room at one side: is the object still there, and does the background go on?
    canny     edges, and words that say neither where nor how large: does the object cover what the edges surround?
              `--plain` leaves the edges out
    depart    img2img at strengths 0.3, 0.6 and 0.9: does the picture depart further each time?
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import flux_engine
from benchmarks import captions, oracle, sheets, world
from benchmarks.world import Placed, Scene
from flux_engine import Control, Engine

COLUMNS = 6
STRENGTHS = (0.3, 0.6, 0.9)
NEAR = 24
"""Pixels around a hole that the autoencoder's convolutions mix with it."""
STEP = 1 / 255
"""Of eight bits."""
COVERS = 0.6
"""Intersection over union from which an object covers the shape that the edges surround."""


@dataclass(frozen=True)
class Case:
    """A picture that was drawn by the world, and where its object is."""

    scene: Scene
    settled: Scene
    placed: list[Placed]
    picture: Image.Image
    rng: random.Random


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    right: bool
    pictures: tuple[Image.Image, ...]
    """What was sent, and what came back."""
    words: str
    figures: dict[str, float]


def cases(seed: int, size: tuple[int, int], *, silent: bool = False) -> Iterator[Case]:
    """Scenes of one object, every word said, or, `silent`, neither where it is nor how large."""
    number = 0
    while True:
        rng = random.Random(f"conditioned {seed} {number}")
        number += 1
        scene = world.sample_scene(rng, things=1, open_share=0.0)
        settled = world.settle(scene, rng)
        placed = world.layout(settled, *size, rng)
        if silent:
            scene = replace(scene, things=tuple(replace(thing, size="", place="") for thing in scene.things))
        yield Case(scene, settled, placed, world.paint(settled.ground, placed, *size), rng)


def hole(case: Case) -> Image.Image:
    """White around the object, on the grid of latents."""
    (thing,) = case.placed
    width, height = case.picture.size
    reach = thing.radius + 10
    box = [thing.cx - reach, thing.cy - reach, thing.cx + reach, thing.cy + reach]
    left, top = (max(0, int(side // 8 * 8)) for side in box[:2])
    right, bottom = (min(end, int(-(-side // 8) * 8)) for side, end in zip(box[2:], (width, height), strict=True))
    mask = Image.new("L", case.picture.size, 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def other_object(case: Case) -> Scene:
    """The scene with another shape in another colour at its place."""
    (thing,), rng = case.scene.things, case.rng
    shapes = [shape for shape in world.SHAPES if shape != thing.shape]
    colors = [color for color in world.contrasting(case.scene.ground) if color not in (thing.color, thing.outline)]
    while True:
        made = replace(thing, shape=rng.choice(shapes), color=rng.choice(colors), outline="")
        if (made.shape, made.color) not in world.HELD_OUT:
            return replace(case.scene, things=(made,))


def repaint(engine: Engine, case: Case, steps: int | None, seed: int, _: argparse.Namespace) -> Outcome:
    """Another object in the hole."""
    wanted = other_object(case)
    words = captions.write(wanted, case.rng)
    drawn = engine(words, image=case.picture, mask=hole(case), num_inference_steps=steps, seed=seed).image
    verdict = oracle.judge(drawn, wanted)
    return Outcome(all(verdict.values()), (case.picture, drawn), f"{words} {_wrong(verdict)}", {})


def keep(engine: Engine, case: Case, steps: int | None, seed: int, _: argparse.Namespace) -> Outcome:
    """What the mask keeps, without pasting back. Its latent is the picture's to the bit, but an autoencoder's attention
    and normalisation reach over the whole picture, and so does what is in the hole."""
    wanted, mask = other_object(case), hole(case)
    asked: dict[str, Any] = {"image": case.picture, "seed": seed}
    words = captions.write(wanted, case.rng)
    drawn = engine(words, mask=mask, paste_back=False, num_inference_steps=steps, **asked).image
    encoded = engine("", strength=0.0, **asked).image
    box = mask.getbbox()
    assert box is not None
    near = Image.new("L", mask.size, 0)
    near.paste(255, (box[0] - NEAR, box[1] - NEAR, box[2] + NEAR, box[3] + NEAR))
    far = np.asarray(near) == 0
    errors = [_error(picture, case.picture, far) for picture in (drawn, encoded)]
    figures = {"kept": errors[0], "autoencoder": errors[1]}
    return Outcome(errors[0] <= errors[1] + STEP, (case.picture, drawn, encoded), words, figures)


def outpaint(engine: Engine, case: Case, steps: int | None, seed: int, _: argparse.Namespace) -> Outcome:
    """Room at one side."""
    width, height = case.picture.size
    ground = case.scene.ground
    across = ground.axis == "x" and ground.kind != "plain"  # the pattern goes on where it does not change
    wide, high = engine.spec.sizes.named("9:16" if across else "16:9")
    more = (wide - width, high - height)
    room = [0, 0, *more] if case.rng.random() < 0.5 else [*more, 0, 0]
    (thing,) = case.scene.things
    (placed,) = case.placed
    whole = width + room[0] + room[2], height + room[1] + room[3]
    middle = placed.cx + room[0], placed.cy + room[1]
    x, y, radius, across_x, across_y = (side / min(whole) for side in (*middle, placed.radius, *whole))
    place = oracle._place((x, y), radius, across_x, across_y)
    wanted = replace(case.scene, things=(replace(thing, place=place, size=""),))
    words = captions.write(wanted, case.rng)
    drawn = engine(words, image=case.picture, outpaint=room, num_inference_steps=steps, seed=seed).image
    verdict = oracle.judge(drawn, wanted)
    kept = drawn.crop((room[0], room[1], room[0] + width, room[1] + height))
    inner = np.zeros((height, width), bool)
    inner[16:-16, 16:-16] = True
    right = all(verdict.values()) and _error(kept, case.picture, inner) == 0
    return Outcome(right, (case.picture, drawn), f"{words} {_wrong(verdict)}", {})


def canny(engine: Engine, case: Case, steps: int | None, seed: int, args: argparse.Namespace) -> Outcome:
    """Edges, and words that say neither where nor how large."""
    words = captions.write(case.scene, case.rng)
    size = dict(zip(("width", "height"), case.picture.size, strict=True))
    control = [] if args.plain else [Control(kind="canny", image=case.picture)]
    result = engine(words, control=control, num_inference_steps=steps, seed=seed, **size)
    truth = Image.new("L", case.picture.size)
    (thing,) = case.placed
    ImageDraw.Draw(truth).polygon(world.outline(thing.shape, thing.cx, thing.cy, thing.radius), fill=255)
    overlap = _overlap(truth, result.image)
    verdict = oracle.judge(result.image, case.scene)
    pictures = (case.picture, *result.controls, result.image)
    figures = {"overlap": overlap, "as said": float(all(verdict.values()))}
    return Outcome(overlap >= COVERS, pictures, f"{words} {overlap:.2f}", figures)


def depart(engine: Engine, case: Case, steps: int | None, seed: int, _: argparse.Namespace) -> Outcome:
    """Three strengths."""
    words = captions.write(other_object(case), case.rng)
    steps = steps or 20  # so that every strength walks some
    drawn = [
        engine(words, image=case.picture, strength=strength, num_inference_steps=steps, seed=seed).image
        for strength in STRENGTHS
    ]
    whole = np.ones(case.picture.size[::-1], bool)
    far = [_error(picture, case.picture, whole) for picture in drawn]
    figures = {f"at {strength}": error for strength, error in zip(STRENGTHS, far, strict=True)}
    return Outcome(far == sorted(far), (case.picture, *drawn), words, figures)


Task = Callable[[Engine, Case, int | None, int, argparse.Namespace], Outcome]
TASKS: dict[str, Task] = {"repaint": repaint, "keep": keep, "outpaint": outpaint, "canny": canny, "depart": depart}


def measure(
    engine: Engine, task: str, count: int, seed: int, *, steps: int | None = None, plain: bool = False
) -> list[Outcome]:
    """The outcomes of `count` cases at the model's own size; outpainting comes to 16:9 or 9:16."""
    size = engine.spec.sizes.named("1:1")
    if task == "outpaint":  # the square that 16:9 and 9:16 have in them
        short = min(engine.spec.sizes.named("16:9"))
        size = (short, short)
    sampled = cases(seed, size, silent=task == "canny")
    args = argparse.Namespace(plain=plain)
    return [TASKS[task](engine, next(sampled), steps, seed + k, args) for k in range(count)]


def share(outcomes: list[Outcome]) -> float:
    """Of those that are right."""
    return sum(outcome.right for outcome in outcomes) / len(outcomes)


def mean(outcomes: list[Outcome]) -> dict[str, float]:
    """Of every figure."""
    names = outcomes[0].figures
    return {name: float(np.mean([outcome.figures[name] for outcome in outcomes])) for name in names}


def _wrong(verdict: dict[str, bool]) -> str:
    return " ".join(f"[{name}]" for name, right in verdict.items() if not right)


def _error(one: Image.Image, other: Image.Image, where: np.ndarray) -> float:
    """Root mean square of the difference, in [0, 1]."""
    difference = (np.asarray(one, np.float32) - np.asarray(other, np.float32))[where] / 255
    return float(np.sqrt((difference**2).mean())) if difference.size else 0.0


def _overlap(truth: Image.Image, picture: Image.Image) -> float:
    """Of a white shape with the object in a picture that covers it best."""
    pixels = oracle._pixels(picture)
    shape = np.asarray(truth.resize(pixels.shape[1::-1], Image.Resampling.BOX)) > 127
    best = 0.0
    for mask, (left, top) in oracle._blobs(pixels, oracle._backdrop(pixels)):
        found = np.zeros(shape.shape, bool)
        found[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        best = max(best, float((shape & found).sum() / (shape | found).sum()))
    return best


def main() -> None:
    """Draw, judge, print; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", default="demo-schnell")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--controlnet", help="a kind that a manifest knows, or KIND=FILE; default canny for canny")
    parser.add_argument("--plain", action="store_true", help="canny: without the edges")
    parser.add_argument("--output", type=Path, help="write the pictures as one sheet")
    args = parser.parse_args()
    nets: Any = ()
    if args.task == "canny" and not args.plain:
        kind, _, file = (args.controlnet or "canny").partition("=")
        nets = {kind: file} if file else [kind]
    engine = flux_engine.load(args.model, controlnets=nets)
    outcomes = measure(engine, args.task, args.count, args.seed, steps=args.steps, plain=args.plain)
    if args.output:
        tiles = [
            sheets.tile(picture, outcome.words, "" if outcome.right else "wrong")
            for outcome in outcomes
            for picture in outcome.pictures
        ]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sheets.grid(tiles, COLUMNS).save(args.output)
    line = {"task": args.task, "model": args.model, "count": args.count, "seed": args.seed, "plain": args.plain,
            "right": round(share(outcomes), 4), "mean": {k: round(v, 4) for k, v in mean(outcomes).items()},
            "oracle": oracle.VERSION, "world": world.VERSION}  # fmt: skip
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
