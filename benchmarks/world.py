"""The drawn world: single objects on plain backgrounds, and the words people use for them.

The demo models are trained on these pictures, and `benchmarks.oracle` reads them back. A `Scene` states every
attribute; a caption may leave size, place and background unsaid, and then means the default (medium, centre, white).
Everything is drawn anti-aliased at any size; coordinates are fractions of the picture's sides.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

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
SIZES = {"small": 0.14, "medium": 0.22, "large": 0.33}
"""Size -> radius of the circumscribed box, as a fraction of the shorter side."""
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
"""Place -> direction from the centre, (x, y)."""

WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
    "star": ("star", "star", "five-pointed star"),
    "cross": ("cross", "cross", "plus sign"),
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "grey"),
    "circle": ("circle", "circle", "disc"),
    "center": (
        "in the center",
        "in the middle",
        "at the center",
        "in the centre",
        "centered",
    ),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "top left": ("in the top left corner", "at the top left", "in the upper left"),
    "top right": ("in the top right corner", "at the top right", "in the upper right"),
    "bottom left": (
        "in the bottom left corner",
        "at the bottom left",
        "in the lower left",
    ),
    "bottom right": (
        "in the bottom right corner",
        "at the bottom right",
        "in the lower right",
    ),
}
"""Attribute -> the ways to say it; an attribute without an entry is said as it is."""


@dataclass(frozen=True)
class Scene:
    """One picture of the world."""

    shape: str
    color: str
    size: str = "medium"
    place: str = "center"
    background: str = "white"


def sample_scene(rng: random.Random) -> Scene:
    """A scene with every attribute drawn at random, object and background of different colours."""
    color, background = rng.sample(list(COLORS), 2)
    return Scene(
        shape=rng.choice(SHAPES),
        color=color,
        size=rng.choice(list(SIZES)),
        place=rng.choice(list(PLACES)),
        background=background,
    )


def offset(radius: float) -> float:
    """How far from the centre an object of this radius is placed, as a fraction of the shorter side."""
    return min(0.27, 0.47 - radius)


def outline(shape: str, cx: float, cy: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape, (x, y) in pixels if the arguments are."""
    if shape == "circle":
        angles = [2 * math.pi * i / 96 for i in range(96)]
        return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in angles]
    if shape == "square":
        side = 0.88 * radius
        return [
            (cx - side, cy - side),
            (cx + side, cy - side),
            (cx + side, cy + side),
            (cx - side, cy + side),
        ]
    if shape == "triangle":
        half, low = radius, 0.87 * radius
        return [(cx, cy - low), (cx + half, cy + low), (cx - half, cy + low)]
    if shape == "diamond":
        return [
            (cx, cy - radius),
            (cx + radius, cy),
            (cx, cy + radius),
            (cx - radius, cy),
        ]
    if shape == "star":
        points: list[tuple[float, float]] = []
        for i in range(10):
            length = radius * (1.05 if i % 2 == 0 else 0.42)
            angle = math.pi * i / 5 - math.pi / 2
            points.append((cx + length * math.cos(angle), cy + length * math.sin(angle)))
        return points
    if shape == "cross":
        r, arm = radius, radius / 3
        return [
            (cx - arm, cy - r),
            (cx + arm, cy - r),
            (cx + arm, cy - arm),
            (cx + r, cy - arm),
            (cx + r, cy + arm),
            (cx + arm, cy + arm),
            (cx + arm, cy + r),
            (cx - arm, cy + r),
            (cx - arm, cy + arm),
            (cx - r, cy + arm),
            (cx - r, cy - arm),
            (cx - arm, cy - arm),
        ]
    raise ValueError(f"unknown shape {shape!r}")


def draw(scene: Scene, width: int, height: int, rng: random.Random | None = None) -> Image.Image:
    """Draw a scene. With `rng`, position and size vary a little, as the same words leave room for."""
    short = min(width, height)
    radius = SIZES[scene.size]
    jitter_x = jitter_y = 0.0
    if rng is not None:
        radius += rng.uniform(-0.015, 0.015)
        jitter_x, jitter_y = rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02)
    dx, dy = PLACES[scene.place]
    # Along the longer side the object moves out with the picture's edge.
    reach_x = offset(radius) + (width / short - 1) / 2
    reach_y = offset(radius) + (height / short - 1) / 2
    cx = width / 2 + (dx * reach_x + jitter_x) * short
    cy = height / 2 + (dy * reach_y + jitter_y) * short

    canvas = Image.new(
        "RGB",
        (width * SUPERSAMPLING, height * SUPERSAMPLING),
        COLORS[scene.background],
    )
    points = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline(scene.shape, cx, cy, radius * short)]
    ImageDraw.Draw(canvas).polygon(points, fill=COLORS[scene.color])
    return canvas.reduce(SUPERSAMPLING)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to ask for the scene. Defaults are often left unsaid."""

    def say(word: str) -> str:
        return rng.choice(WORDS.get(word, (word,)))

    size = "" if scene.size == "medium" and rng.random() < 0.85 else f"{say(scene.size)} "
    thing = f"{size}{say(scene.color)} {say(scene.shape)}"
    article = "an" if thing[0] in "aeiou" else "a"
    place = "" if scene.place == "center" and rng.random() < 0.7 else say(scene.place)
    unsaid = scene.background == "white" and rng.random() < 0.5
    ground = say(scene.background)
    ground_article = "an" if ground[0] in "aeiou" else "a"
    on_ground = f"on {ground_article} {ground} background"

    if unsaid:
        forms = [f"{article} {thing} {place}", f"{thing}, {place}" if place else thing]
        forms += [f"a picture of {article} {thing} {place}"]
    else:
        forms = [
            f"{article} {thing} {place} {on_ground}",
            f"{article} {thing} {on_ground} {place}",
            f"{thing} {place} {on_ground}",
            f"{thing}, {place}, {ground} background" if place else f"{thing}, {ground} background",
            f"{on_ground}, {article} {thing} {place}",
            f"{ground_article} {ground} background with {article} {thing} {place}",
            f"a picture of {article} {thing} {place} {on_ground}",
            f"a drawing of {article} {thing} {place} {on_ground}",
        ]
    text = " ".join(rng.choice(forms).split())
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def draw_clutter(width: int, height: int, rng: random.Random) -> Image.Image:
    """A picture of several objects of any colour, size and place: what the autoencoder learns from."""

    def any_color() -> tuple[int, int, int]:
        if rng.random() < 0.6:
            return rng.choice(list(COLORS.values()))
        return (rng.randrange(256), rng.randrange(256), rng.randrange(256))

    big = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    canvas = Image.new("RGB", big, any_color())
    if rng.random() < 0.25:  # a gradient between two colours
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)))
        canvas = Image.composite(canvas, Image.new("RGB", big, any_color()), ramp.resize(big))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 5)):
        radius = rng.uniform(0.05, 0.45) * min(big)
        points = outline(
            rng.choice(SHAPES),
            rng.uniform(0, 1) * big[0],
            rng.uniform(0, 1) * big[1],
            radius,
        )
        pen.polygon(points, fill=any_color())
    return canvas.reduce(SUPERSAMPLING)
