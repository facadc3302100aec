"""Read a picture of the drawn world back: which shape, colour, size, place and background it shows.

Geometry and colour only, nothing learned. The background is the colour of the border; the object is what is nearer to
the other colour; its shape is the one whose drawn outline of the same area covers it best.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import world
from benchmarks.world import Scene

SIDE = 128
"""Pictures are read with their shorter side at this many pixels."""
MIN_OVERLAP = 0.75
"""Intersection over union below which an object is no shape of the world."""
MAX_COLOR_DISTANCE = 70.0
"""RGB distance beyond which a colour is none of the world's."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows; an empty string for what could not be told."""

    shape: str
    color: str
    size: str
    place: str
    background: str
    overlap: float
    """Intersection over union of the object and its best shape."""


NOTHING = Reading("", "", "", "", "", 0.0)


def read(picture: Image.Image) -> Reading:
    """Read one picture."""
    picture = picture.convert("RGB")
    short = min(picture.size)
    width, height = (round(side * SIDE / short) for side in picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX), float)

    ring = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
         pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)]
    )  # fmt: skip
    ground = np.median(ring, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    far = distance > 0.7 * np.percentile(distance, 99.5)
    if distance.max() < 30 or not far.any():
        return NOTHING
    color = np.median(pixels[far], axis=0)
    along = (pixels - ground) @ (color - ground) / max(np.sum((color - ground) ** 2), 1.0)
    mask = along > 0.5
    area = int(mask.sum())
    if area < 20:
        return NOTHING

    best, overlap, radius, center = "", 0.0, 0.0, (0.0, 0.0)
    for shape in world.SHAPES:
        guess = _fit(mask, shape, area)
        if guess[0] > overlap:
            (overlap, radius, center), best = guess, shape
    fraction = radius / SIDE
    reach = world.offset(fraction)
    steps = [
        (c - full / 2) / (reach + (full / SIDE - 1) / 2) / SIDE for c, full in zip(center, (width, height), strict=True)
    ]
    direction = tuple(int(np.clip(round(s), -1, 1)) for s in steps)
    size = min(world.SIZES, key=lambda name: abs(world.SIZES[name] - fraction))
    return Reading(
        shape=best if overlap >= MIN_OVERLAP else "",
        color=_name(color),
        size=size if abs(world.SIZES[size] - fraction) < 0.06 else "",
        place=next(name for name, d in world.PLACES.items() if d == direction),
        background=_name(ground),
        overlap=overlap,
    )


def judge(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Attribute -> whether the picture shows what the scene says."""
    reading = read(picture)
    return {field.name: getattr(reading, field.name) == getattr(scene, field.name) for field in fields(Scene)}


def _fit(mask: np.ndarray, shape: str, area: int) -> tuple[float, float, tuple[float, float]]:
    """Overlap, radius and centre of a shape with the mask's area and centroid."""
    unit = _template(shape, (0.0, 0.0), 100.0, (400, 400), shift=200.0)
    ys, xs = np.nonzero(unit)
    radius = 100.0 * (area / len(xs)) ** 0.5
    rows, columns = np.nonzero(mask)
    # The centroid of a triangle or star is not the centre it is drawn around.
    center = (
        columns.mean() + 0.5 - (xs.mean() + 0.5 - 200) * radius / 100,
        rows.mean() + 0.5 - (ys.mean() + 0.5 - 200) * radius / 100,
    )
    drawn = _template(shape, center, radius, (mask.shape[1], mask.shape[0]))
    union = np.logical_or(drawn, mask).sum()
    return np.logical_and(drawn, mask).sum() / union, radius, center


def _template(
    shape: str,
    center: tuple[float, float],
    radius: float,
    size: tuple[int, int],
    shift: float = 0.0,
) -> np.ndarray:
    """A shape as a mask."""
    factor = 4
    canvas = Image.new("L", (size[0] * factor, size[1] * factor))
    points = world.outline(shape, center[0] + shift, center[1] + shift, radius)
    ImageDraw.Draw(canvas).polygon([(x * factor, y * factor) for x, y in points], fill=255)
    return np.asarray(canvas.reduce(factor)) > 127


def _name(color: np.ndarray) -> str:
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in world.COLORS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= MAX_COLOR_DISTANCE else ""
