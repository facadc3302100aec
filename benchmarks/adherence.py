"""How often a model draws what it is asked for: sampled scenes, put into words, drawn, and read back by the oracle.

python -m benchmarks.adherence --model demo-schnell --count 200 --seed 0 [--steps N] [--quantization X]
    [--size WxH or all] [--guidance G] [--held-out] [--things 1|2] [--autoencoder] [--output SHEET.png]

A picture counts as right if every attribute that its caption states is. The same seed asks for the same scenes in the
same words, whatever the other options are; a larger count adds to them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import flux_engine
from benchmarks import captions, oracle, sheets, world
from flux_engine import Engine, images
from flux_engine.sizes import PUBLISHED_SIZES
from flux_engine.specs import ModelSpec

Size = tuple[int, int]
Draw = Callable[[world.Scene, str, int, Size | None], Image.Image]
"""Scene, its caption, seed, size or None for the model's own -> picture."""
COLUMNS = 8
MAX_TILES = 400
"""Most pictures a sheet shows, the first ones."""


@dataclass(frozen=True)
class Drawing:
    """A picture that was asked for, and what the oracle says about it."""

    scene: world.Scene
    caption: str
    held_out: bool
    """Whether the first object is a pair of shape and colour that no training has shown."""
    picture: Image.Image
    verdict: dict[str, bool]
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the picture shows everything that the caption states."""
        return all(self.verdict.values())


@dataclass(frozen=True)
class Report:
    """What came of a measurement. A share is None where there is nothing to divide by."""

    drawings: tuple[Drawing, ...]

    @property
    def asked(self) -> list[Drawing]:
        """The drawings that the figures are about: all but those of held-out pairs."""
        return [drawing for drawing in self.drawings if not drawing.held_out]

    @property
    def adherence(self) -> float | None:
        return _share(drawing.right for drawing in self.asked)

    @property
    def held_out(self) -> float | None:
        return _share(drawing.right for drawing in self.drawings if drawing.held_out)

    @property
    def attributes(self) -> dict[str, list[bool]]:
        """Attribute -> the verdicts on the pictures whose captions state it."""
        verdicts: dict[str, list[bool]] = defaultdict(list)
        for drawing in self.asked:
            for name, right in drawing.verdict.items():
                verdicts[name].append(right)
        return dict(verdicts)

    @property
    def sizes(self) -> dict[str, float | None]:
        """Width x height -> share of right pictures."""
        names = dict.fromkeys(_name(drawing.picture.size) for drawing in self.asked)
        return {name: _share(d.right for d in self.asked if _name(d.picture.size) == name) for name in names}

    @property
    def seconds_per_picture(self) -> float:
        return statistics.median(drawing.seconds for drawing in self.drawings)

    def with_things(self, number: int) -> float | None:
        """Share of right pictures among those of one or of two objects."""
        return _share(drawing.right for drawing in self.asked if len(drawing.scene.things) == number)


def _share(verdicts: Iterator[bool]) -> float | None:
    known = list(verdicts)
    return round(sum(known) / len(known), 4) if known else None


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def scenes(seed: int, *, held_out: bool = False, things: int | None = None) -> Iterator[tuple[world.Scene, str]]:
    """Scenes and their captions, without end. `things` leaves out the scenes with another number of objects."""
    for number in numbers():
        rng = random.Random(f"adherence {seed} {number} {held_out}")
        scene = world.sample_scene(rng, held_out=held_out)
        caption = captions.write(scene, rng)
        if things is None or len(scene.things) == things:
            yield scene, caption


def from_captions(engine: Engine, *, steps: int | None = None, guidance: float | None = None) -> Draw:
    """Draws with a model, which is told the caption."""

    def draw(_: world.Scene, caption: str, seed: int, size: Size | None) -> Image.Image:
        fields: dict[str, Any] = {} if size is None else {"width": size[0], "height": size[1]}
        return engine(caption, seed=seed, num_inference_steps=steps, guidance_scale=guidance, **fields).image

    return draw


def through_autoencoder(engine: Engine) -> Draw:
    """The world's own drawing, encoded and decoded: what the best of transformers could draw with this autoencoder."""
    vae = engine._pipeline.family.vae

    @torch.inference_mode()
    def draw(scene: world.Scene, _: str, seed: int, size: Size | None) -> Image.Image:
        picture = world.draw(scene, *(size or engine.spec.sizes.named("1:1")), random.Random(seed))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        return images.to_pil(vae.decode(vae.encode(pixels))[0])

    return draw


def measure(
    draw: Draw,
    count: int,
    seed: int,
    *,
    sizes: Sequence[Size | None] = (None,),
    things: int | None = None,
    held_out: bool = False,
) -> Report:
    """Draw `count` sampled scenes at each size, None for the model's own, and judge them.

    `held_out` draws as many again whose first object is a held-out pair of shape and colour; they count apart.
    """
    drawings: list[Drawing] = []
    for size in sizes:
        for is_held_out in (False, True)[: 1 + held_out]:
            asked = islice(scenes(seed, held_out=is_held_out, things=things), count)
            for number, (scene, caption) in enumerate(asked):
                began = time.perf_counter()
                picture = draw(scene, caption, seed + number, size)
                seconds = time.perf_counter() - began
                verdict = oracle.judge(picture, scene)
                drawings.append(Drawing(scene, caption, is_held_out, picture, verdict, seconds))
    return Report(tuple(drawings))


def table(report: Report) -> str:
    """The figures, to be read."""
    lines = [f"{'':16}{'stated':>8}{'right':>8}"]

    def add(name: str, number: int, share: float | None) -> None:
        if share is not None:
            lines.append(f"{name:16}{number:8}{share:8.3f}")

    for name, verdicts in report.attributes.items():
        add(name, len(verdicts), _share(iter(verdicts)))
    for name, number in (("one object", 1), ("two objects", 2)):
        add(name, sum(len(drawing.scene.things) == number for drawing in report.asked), report.with_things(number))
    add("everything", len(report.asked), report.adherence)
    add("held-out pairs", len(report.drawings) - len(report.asked), report.held_out)
    lines.append(f"{'seconds per picture':24}{report.seconds_per_picture:8.3f}")
    return "\n".join(lines)


def sheet(drawings: Sequence[Drawing]) -> Image.Image:
    """The pictures in a grid, with their captions and what is wrong with them."""
    tiles: list[Image.Image] = []
    for drawing in drawings[:MAX_TILES]:
        wrong = ", ".join(name for name, right in drawing.verdict.items() if not right)
        tiles.append(sheets.tile(drawing.picture, drawing.caption, wrong))
    return sheets.grid(tiles, COLUMNS)


def all_sizes(spec: ModelSpec) -> list[Size]:
    """Every size in a model's table."""
    return [spec.sizes.named(ratio, megapixels) for ratio in PUBLISHED_SIZES for megapixels in spec.sizes.classes]


def main() -> None:
    """Draw, judge, print; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-schnell")
    parser.add_argument("--count", type=int, default=100, help="pictures, at each size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--size", type=_size, help="WxH, or all for every size of the model")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--held-out", action="store_true", help="as many again with pairs no training has shown")
    parser.add_argument(
        "--autoencoder", action="store_true", help="leave the transformer out: drawn pictures, encoded and decoded"
    )
    parser.add_argument("--things", type=int, choices=(1, 2), help="only scenes with this number of objects")
    parser.add_argument("--output", type=Path, help="write the pictures as one sheet")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count is less than 1")

    try:
        engine = flux_engine.load(args.model, quantization=args.quantization)
    except flux_engine.FluxEngineError as error:
        parser.error(str(error))
    if args.autoencoder:
        draw = through_autoencoder(engine)
    else:
        draw = from_captions(engine, steps=args.steps, guidance=args.guidance)
    report = measure(
        draw,
        args.count,
        args.seed,
        sizes=all_sizes(engine.spec) if args.size == "all" else [args.size],
        things=args.things,
        held_out=args.held_out,
    )
    sys.stdout.write(table(report) + "\n")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sheet(report.drawings).save(args.output)
    line = {
        "model": args.model,
        "count": args.count,
        "seed": args.seed,
        "autoencoder": args.autoencoder,
        "steps": args.steps or engine.spec.num_inference_steps,
        "size": "all" if args.size == "all" else _name(report.drawings[0].picture.size),
        "adherence": report.adherence,
        "attributes": {name: _share(iter(verdicts)) for name, verdicts in report.attributes.items()},
        "one_object": report.with_things(1),
        "two_objects": report.with_things(2),
        "held_out": report.held_out,
        "seconds_per_picture": round(report.seconds_per_picture, 4),
        "oracle": oracle.VERSION,
        "world": world.VERSION,
        "quantization": args.quantization,
    }
    if args.size == "all":
        line["sizes"] = report.sizes
    sys.stdout.write(json.dumps(line) + "\n")


def _size(text: str) -> Size | str:
    """A size as it is written on the command line."""
    if text == "all":
        return text
    width, _, height = text.lower().partition("x")
    return int(width), int(height)


if __name__ == "__main__":
    main()
