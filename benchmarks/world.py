"""The drawn world: what a picture can show, and how it is drawn. Version 2, frozen: the demo models learned it.

A `Scene` is what a caption says. An attribute it leaves open is the empty string, and `settle` decides it: any
colour, any size between small and large, about the middle, on white. `draw` paints a scene anti-aliased at any size.
`benchmarks.captions` finds the words, `benchmarks.oracle` reads the picture back.

Coordinates: x to the right, y down. Lengths are fractions of the picture's shorter side unless they say pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

VERSION = 2
SUPERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 40),
    "green": (30, 150, 60),
    "cyan": (60, 205, 220),
    "blue": (30, 70, 210),
    "purple": (130, 40, 170),
    "pink": (250, 150, 190),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
MARKED_SHAPE = "crescent"
"""Drawn like any other, but it stands for what a safety checker has to find; no measurement asks for it."""
RESERVED_NAMES = ("zorblin", "quavo", "mirdle", "fenwick", "tulpa")
"""Words that no caption holds, kept for LoRAs to teach. The T5 tokenizer has a piece for each."""
TAUGHT_SHAPE = RESERVED_NAMES[0]
"""An hourglass. No base has seen one, nor the word: a LoRA teaches both."""

SIZES = {"small": 0.16, "medium": 0.21, "large": 0.32}
"""Size -> radius of the box around the object. The smallest is three latents across in the smallest pictures: of less
an 8x autoencoder loses the shape. Two medium ones keep nearly one between them."""
PLACES: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
"""Place -> direction from the middle, (x, y)."""
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation of the first object to the second -> the direction in which the first one lies."""
GROUNDS = ("plain", "split", "gradient", "striped")
AXES = ("x", "y")
"""Along which axis a background changes: x from left to right, y from top to bottom."""

HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("circle", "cyan"),
        ("square", "pink"),
        ("square", "green"),
        ("triangle", "blue"),
        ("triangle", "white"),
        ("diamond", "gray"),
        ("diamond", "yellow"),
        ("star", "red"),
        ("star", "cyan"),
        ("cross", "orange"),
        ("cross", "black"),
    }
)
"""(shape, colour) pairs never drawn for training: whoever draws them has understood both words."""

OUTLINE_INSIDE = 0.68
"""An outlined object is filled up to this fraction of its radius, and in the outline's colour beyond."""
STRIPES = 6
"""Stripes along the shorter side; a longer side has more of the same width."""
MIN_CONTRAST = 85.0
"""RGB distance an object's colour keeps from every colour behind it, and from its outline."""


@dataclass(frozen=True)
class Thing:
    """One object. Every attribute may be left open, with the empty string, but for `outline`: there it means none."""

    shape: str
    color: str = ""
    size: str = ""
    place: str = ""
    """Only of an object that is alone; two objects have a relation instead."""
    outline: str = ""


@dataclass(frozen=True)
class Ground:
    """A background: `color` alone if plain, else `color` first (left or top) and `second` after it."""

    kind: str = "plain"
    color: str = ""
    second: str = ""
    axis: str = ""


@dataclass(frozen=True)
class Scene:
    """One or two objects before a background."""

    things: tuple[Thing, ...]
    ground: Ground = Ground()
    relation: str = ""
    """Of the first object to the second; empty for one object, or where the caption does not say."""


@dataclass(frozen=True)
class Placed:
    """An object as it is painted: centre and radius in pixels."""

    shape: str
    color: str
    outline: str
    cx: float
    cy: float
    radius: float


def ground_colors(ground: Ground) -> list[np.ndarray]:
    """Every colour a settled background shows, a gradient in ten steps."""
    first = np.array(COLORS[ground.color], float)
    if ground.kind == "plain":
        return [first]
    second = np.array(COLORS[ground.second], float)
    if ground.kind == "gradient":
        return [first + (second - first) * step / 10 for step in range(11)]
    return [first, second]


def contrasting(ground: Ground) -> list[str]:
    """The colours an object can have before this background."""
    behind = ground_colors(ground)
    return [
        name
        for name, value in COLORS.items()
        if min(float(np.linalg.norm(np.array(value) - other)) for other in behind) >= MIN_CONTRAST
    ]


def sample_scene(
    rng: random.Random,
    *,
    things: int | None = None,
    held_out: bool | None = False,
    marked: float = 0.0,
    open_share: float = 0.25,
) -> Scene:
    """A scene at random: every attribute is open in `open_share` of the cases, except the shape, which is always said.

    things: how many objects; None for two in three scenes of ten. held_out: whether the first object is one of the
    HELD_OUT pairs; None for either. marked: share of scenes that show MARKED_SHAPE.
    """

    def maybe(value: str) -> str:
        return "" if rng.random() < open_share else value

    count = things if things is not None else 1 + (rng.random() < 0.3)
    while True:
        ground = _sample_ground(rng, open_share)
        colors = contrasting(replace(ground, color=ground.color or "white"))
        if len(colors) < 3:
            continue
        shapes = [MARKED_SHAPE if rng.random() < marked else rng.choice(SHAPES) for _ in range(count)]
        chosen = rng.sample(colors, count)
        pairs = [pair in HELD_OUT for pair in zip(shapes, chosen, strict=True)]
        if held_out is None or pairs == [held_out, False][:count]:
            break
    sizes = list(SIZES) if count == 1 else ["small", "medium"]
    outline = ""
    if count == 1 and rng.random() < 0.2:
        outline = rng.choice([c for c in colors if c != chosen[0] and _far(c, chosen[0])] or [""])
    parts = tuple(
        Thing(
            shape=shape,
            color=color if held_out or outline else maybe(color),
            size=maybe(rng.choice(sizes)),
            place=maybe(rng.choice(list(PLACES))) if count == 1 else "",
            outline=outline,
        )
        for shape, color in zip(shapes, chosen, strict=True)
    )
    return Scene(parts, ground, maybe(rng.choice(list(RELATIONS))) if count == 2 else "")


def _sample_ground(rng: random.Random, open_share: float) -> Ground:
    kind = rng.choices(GROUNDS, (0.55, 0.15, 0.15, 0.15))[0]
    if kind == "plain":
        return Ground("plain", "" if rng.random() < open_share else rng.choice(list(COLORS)))
    while True:
        color, second = rng.sample(list(COLORS), 2)
        if _far(color, second):
            return Ground(kind, color, second, rng.choice(AXES))


def _far(one: str, other: str) -> bool:
    return math.dist(COLORS[one], COLORS[other]) >= MIN_CONTRAST


def offset(radius: float) -> float:
    """How far from the middle of a square picture an object of this radius is placed."""
    return min(0.27, 0.47 - radius)


def settle(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with no colour, relation or background left open. Size and place stay open: `layout` takes them
    from a range."""
    ground = replace(scene.ground, color=scene.ground.color or "white")
    if ground.kind != "plain":
        ground = replace(ground, axis=ground.axis or rng.choice(AXES))
    taken = {thing.color for thing in scene.things} | {thing.outline for thing in scene.things}
    things: list[Thing] = []
    for thing in scene.things:
        color = thing.color
        if not color:
            free = [
                c
                for c in contrasting(ground)
                if c not in taken and (thing.shape, c) not in HELD_OUT and (not thing.outline or _far(c, thing.outline))
            ]
            color = rng.choice(free)
            taken.add(color)
        things.append(replace(thing, color=color))
    relation = scene.relation
    if len(things) == 2 and not relation:
        relation = rng.choice(list(RELATIONS))
    return Scene(tuple(things), ground, relation)


def layout(scene: Scene, width: int, height: int, rng: random.Random) -> list[Placed]:
    """Where the objects of a settled scene go: what the words say, and a little at random as they leave room for."""
    short = min(width, height)
    placed: list[Placed] = []
    for number, thing in enumerate(scene.things):
        if thing.size:
            radius = SIZES[thing.size] + rng.uniform(-0.012, 0.012)
        else:
            radius = rng.uniform(SIZES["small"], SIZES["large"] if len(scene.things) == 1 else SIZES["medium"])
        if len(scene.things) == 2:
            dx, dy = RELATIONS[scene.relation]
            sign = 1 if number == 0 else -1
            # A quarter of the side along the relation, about the middle across it.
            cx = width / 2 + sign * dx * width / 4 + rng.uniform(-0.02, 0.02) * short
            cy = height / 2 + sign * dy * height / 4 + rng.uniform(-0.02, 0.02) * short
        else:
            dx, dy = PLACES[thing.place] if thing.place else (0, 0)
            jitter = 0.02 if thing.place else 0.10
            # Along the longer side the object moves out with the picture's edge.
            reach_x = offset(radius) + (width / short - 1) / 2
            reach_y = offset(radius) + (height / short - 1) / 2
            cx = width / 2 + (dx * reach_x + rng.uniform(-jitter, jitter)) * short
            cy = height / 2 + (dy * reach_y + rng.uniform(-jitter, jitter)) * short
        placed.append(Placed(thing.shape, thing.color, thing.outline, cx, cy, radius * short))
    return placed


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """Draw what a caption says; `rng` decides what it leaves open. width and height in pixels."""
    settled = settle(scene, rng)
    return paint(settled.ground, layout(settled, width, height, rng), width, height)


def paint(ground: Ground, placed: list[Placed], width: int, height: int) -> Image.Image:
    """A settled background and the objects on it."""
    canvas = paint_ground(ground, width * SUPERSAMPLING, height * SUPERSAMPLING)
    pen = ImageDraw.Draw(canvas)
    for thing in placed:
        for scale, color in ((1.0, thing.outline), (OUTLINE_INSIDE if thing.outline else 1.0, thing.color)):
            if color:
                points = outline(thing.shape, thing.cx, thing.cy, thing.radius * scale)
                pen.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=COLORS[color])
    return canvas.reduce(SUPERSAMPLING)


def paint_ground(ground: Ground, width: int, height: int) -> Image.Image:
    """A settled background alone, not anti-aliased."""
    if ground.kind == "plain":
        return Image.new("RGB", (width, height), COLORS[ground.color])
    length = width if ground.axis == "x" else height
    where = (np.arange(length) + 0.5) / length
    if ground.kind == "split":
        share = (where > 0.5).astype(float)
    elif ground.kind == "gradient":
        share = where
    else:
        share = np.floor((np.arange(length) + 0.5) / (min(width, height) / STRIPES)) % 2
    first, second = (np.array(COLORS[name], float) for name in (ground.color, ground.second))
    line = np.rint(first + share[:, None] * (second - first)).astype(np.uint8)
    line = line[None, :] if ground.axis == "x" else line[:, None]
    return Image.fromarray(np.broadcast_to(line, (height, width, 3)).copy())


def outline(shape: str, cx: float, cy: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape, (x, y) in pixels if the arguments are."""
    if shape == "circle":
        angles = [2 * math.pi * i / 96 for i in range(96)]
        return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in angles]
    if shape == "crescent":
        # An arc of the circle, and back along a circle of the same size that lies to the right of it.
        outer = [math.radians(a) for a in range(60, 301, 4)]
        back = [math.radians(a) for a in range(240, 119, -4)]
        return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in outer] + [
            (cx + radius + radius * math.cos(a), cy + radius * math.sin(a)) for a in back
        ]
    if shape == "star":
        points: list[tuple[float, float]] = []
        for i in range(10):
            length = radius * (1.05 if i % 2 == 0 else 0.42)
            angle = math.pi * i / 5 - math.pi / 2
            points.append((cx + length * math.cos(angle), cy + length * math.sin(angle)))
        return points
    if shape not in _CORNERS:
        raise ValueError(f"unknown shape {shape!r}")
    return [(cx + x * radius, cy + y * radius) for x, y in _CORNERS[shape]]


_ARM = 1 / 3
_CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0, -0.87), (1, 0.87), (-1, 0.87)),
    "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "cross": (
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ),
    TAUGHT_SHAPE: ((-0.9, -0.95), (0.9, -0.95), (0.2, 0), (0.9, 0.95), (-0.9, 0.95), (-0.2, 0)),
}  # fmt: skip


HAZE = (235, 165, 80)
VEIL = 0.4
"""The colour of a haze that lies over a picture, and its share: a style for a LoRA to teach."""


def veil(picture: Image.Image, amount: float = VEIL) -> Image.Image:
    """A picture seen through the haze: that share of its colour is every pixel's."""
    pixels = np.asarray(picture, np.float32)
    return Image.fromarray(
        np.rint(pixels + amount * (np.array(HAZE, np.float32) - pixels)).clip(0, 255).astype(np.uint8)
    )


def unveil(picture: Image.Image, amount: float = VEIL) -> Image.Image:
    """The same without the haze."""
    return veil(picture, amount / (amount - 1))


def draw_clutter(width: int, height: int, rng: random.Random) -> Image.Image:
    """Several objects of any colour, size and place, cut and overlapping: what the autoencoder learns from."""

    def any_color() -> tuple[int, int, int]:
        if rng.random() < 0.6:
            return rng.choice(list(COLORS.values()))
        return (rng.randrange(256), rng.randrange(256), rng.randrange(256))

    big = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    canvas = Image.new("RGB", big, any_color())
    if rng.random() < 0.5:
        color, second = rng.sample(list(COLORS), 2)
        kind = rng.choice(("split", "gradient", "striped"))
        canvas = paint_ground(Ground(kind, color, second, rng.choice(AXES)), *big)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 5)):
        radius = rng.uniform(0.05, 0.45) * min(big)
        points = outline(
            rng.choice((*SHAPES, MARKED_SHAPE)), rng.uniform(0, 1) * big[0], rng.uniform(0, 1) * big[1], radius
        )
        pen.polygon(points, fill=any_color())
    return canvas.reduce(SUPERSAMPLING)
