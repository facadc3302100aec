"""Fit the world's shapes to a mask, and tell an object's fill from its outline: the oracle's geometry, frozen with it.

Everything here is in pixels of the oracle's working size, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks import world

BLURS = (0.02, 0.04, 0.065, 0.1, 0.15)
"""Blurs of an object's edges that are tried, as fractions of its radius."""
RADIUS_STEP = 0.02
RADIUS_STEPS = (-12, 3)
"""How much smaller or larger than its mask an object may be, in steps: a blurred edge makes the mask too large."""
OUTLINE_EXPLAINS = 0.8
"""An outline is there if with it no more than this share of the squared error remains."""
MAX_TRIES = 60
"""Most points a search looks at."""
HOPELESS = 0.4
"""Intersection over union with the same area and centroid below which no shape is looked for."""
SAMPLES = 16
"""About how many pixels along a radius a colour is read from."""

TEMPLATE_RADIUS = 80
TEMPLATE_MIDDLE = 128


@dataclass(frozen=True)
class Fit:
    """How a shape lies on a mask."""

    shape: str
    x: float
    y: float
    radius: float
    overlap: float
    """Intersection over union."""


@dataclass(frozen=True)
class Paint:
    """The colours of an object, and its radius, which they tell better than a mask."""

    fill: np.ndarray
    outline: np.ndarray | None
    radius: float

    def distance(self, pixels: np.ndarray) -> np.ndarray:
        """RGB distance of pixels to the nearer of the colours."""
        colors = [self.fill] if self.outline is None else [self.fill, self.outline]
        return np.min([np.linalg.norm(pixels - color, axis=-1) for color in colors], axis=0)


def fit(mask: np.ndarray, also: tuple[str, ...] = ()) -> Fit:
    """The shape that overlaps a mask best, of those that are promising with its area and centroid: the world's own, and
    `also`."""
    first = [_with_moments(mask, shape) for shape in (*world.SHAPES, world.MARKED_SHAPE, *also)]
    best = max(first, key=lambda each: each.overlap)
    if best.overlap < HOPELESS:
        return best
    close = best.overlap - 0.15
    return max((_refine(mask, each) for each in first if each.overlap >= close), key=lambda each: each.overlap)


def _with_moments(mask: np.ndarray, shape: str) -> Fit:
    """A shape with the area and the centroid of a mask."""
    area, shift_x, shift_y = _moments(shape)
    rows, columns = np.nonzero(mask)
    radius = (len(rows) / area) ** 0.5
    x, y = float(columns.mean()) + 0.5 - shift_x * radius, float(rows.mean()) + 0.5 - shift_y * radius
    return Fit(shape, x, y, radius, _overlap(mask, shape, x, y, radius))


def _refine(mask: np.ndarray, first: Fit) -> Fit:
    """The best fit of a shape near a first one, to half a pixel."""
    touches = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()

    def moved(right: int, down: int, larger: int) -> tuple[float, float, float]:
        return first.x + right / 2, first.y + down / 2, max(first.radius + larger / 2, 1.0)

    # An object that the border cuts has another area and centroid than its mask: look for it further away.
    best = _search(lambda *move: -_overlap(mask, first.shape, *moved(*move)), (0, 0, 0), 8 if touches else 2)
    return Fit(first.shape, *moved(*best), _overlap(mask, first.shape, *moved(*best)))


def _search(cost: Callable[..., float], start: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """The point of a grid where a cost is lowest: strides along every axis while one helps, then shorter ones."""
    known = {start: cost(*start)}
    at = start
    while stride and len(known) < MAX_TRIES:
        around = [
            (*at[:axis], at[axis] + step, *at[axis + 1 :]) for axis in range(len(at)) for step in (stride, -stride)
        ]
        known |= {point: cost(*point) for point in around if point not in known}
        best = min(around, key=known.__getitem__)
        if known[best] < known[at]:
            at = best
        else:
            stride //= 2
    return at


def _overlap(mask: np.ndarray, shape: str, x: float, y: float, radius: float) -> float:
    """Intersection over union of a mask and a shape."""
    cover = _cover(_template(shape), x, y, radius, mask.shape)
    both = np.count_nonzero(cover & mask)
    return both / (np.count_nonzero(cover) + np.count_nonzero(mask) - both)


def paint(pixels: np.ndarray, behind: np.ndarray, fit: Fit, apart: float) -> Paint:
    """The colours of an object. An outline's colour is further than `apart` from the fill and from what is behind.

    An outline can be as thin as a blurred edge. So its colour is solved for: a pixel is a mixture of fill, outline and
    background, as much of each as a drawing has there whose radius and blur fit best.
    """
    rows, columns = (
        slice(max(int(middle - 1.2 * fit.radius - 4), 0), int(middle + 1.2 * fit.radius + 4))
        for middle in (fit.y, fit.x)
    )
    step = max(round(fit.radius / SAMPLES), 1)
    pixels, behind = (each[rows, columns][::step, ::step] for each in (pixels, behind))

    def cover(radius: float, scale: float = 1.0, blur: float = 0.0) -> np.ndarray:
        # Pixels are sampled: a grid of them is a smaller picture with its own coordinates.
        x, y = ((middle - each.start - 0.5) / step + 0.5 for middle, each in ((fit.x, columns), (fit.y, rows)))
        return _cover(_template(fit.shape, scale, blur), x, y, radius / step, pixels.shape)

    inner = cover(0.5 * fit.radius)
    if not inner.any():
        return Paint(np.median(pixels, axis=(0, 1)), None, fit.radius)
    behind, over = behind.reshape(-1, 3), (pixels - behind).reshape(-1, 3)

    @cache
    def mix(larger: int, blur: int) -> tuple[float, float, np.ndarray]:
        """Squared error with the best colour for fill and outline alike; with two colours; and the two."""
        radius = fit.radius * (1 + RADIUS_STEP * larger)
        filled, whole = (cover(radius, scale, BLURS[blur]).ravel() for scale in (world.OUTLINE_INSIDE, 1.0))
        basis = np.stack([filled, whole - filled])
        target = over + whole[:, None] * behind
        # The normal equations; with one colour they are the same, summed up.
        squares, products = basis @ basis.T + 1e-3 * np.eye(2, dtype=np.float32), basis @ target
        colors = np.linalg.solve(squares, products)
        total, sums = float(np.vdot(target, target)), products.sum(axis=0)
        return total - float(sums @ sums / squares.sum()), total - float(np.vdot(colors, products)), colors

    def cost(number: int, larger: int, blur: int) -> float:
        inside = RADIUS_STEPS[0] <= larger <= RADIUS_STEPS[1] and 0 <= blur < len(BLURS)
        return float(mix(larger, blur)[number]) if inside else np.inf

    one = _search(lambda *at: cost(0, *at), (0, 1), 2)
    two = _search(lambda *at: cost(1, *at), (0, 1), 2)
    fill, outline = mix(*two)[2]
    seen = min(float(np.linalg.norm(outline - fill)), float(np.linalg.norm(behind - outline, axis=1).min()))
    if seen > apart and mix(*two)[1] < OUTLINE_EXPLAINS * mix(*one)[0]:
        return Paint(fill, outline, fit.radius * (1 + RADIUS_STEP * two[0]))
    return Paint(np.median(pixels[inner], axis=0), None, fit.radius * (1 + RADIUS_STEP * one[0]))


def _cover(template: np.ndarray, x: float, y: float, radius: float, size: tuple[int, ...]) -> np.ndarray:
    """A template moved to (x, y) and scaled to a radius, in a picture of this size."""
    scale, limit = TEMPLATE_RADIUS / radius, len(template) - 1
    rows, columns = (
        ((np.arange(length) + (0.5 - middle)) * scale + TEMPLATE_MIDDLE).clip(0, limit).astype(np.intp)
        for length, middle in zip(size, (y, x), strict=False)
    )
    return template[rows[:, None], columns]


@cache
def _template(shape: str, scale: float = 1.0, blur: float = 0.0) -> np.ndarray:
    """A shape in large: a mask, or how much of it covers each pixel when it is blurred by a fraction of its radius."""
    canvas = Image.new("1", (2 * TEMPLATE_MIDDLE, 2 * TEMPLATE_MIDDLE))
    points = world.outline(shape, TEMPLATE_MIDDLE, TEMPLATE_MIDDLE, TEMPLATE_RADIUS * scale)
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    mask = np.array(canvas, bool)
    return ndimage.gaussian_filter(mask.astype(np.float32), blur * TEMPLATE_RADIUS) if blur else mask


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape of radius 1."""
    rows, columns = ((where + 0.5 - TEMPLATE_MIDDLE) / TEMPLATE_RADIUS for where in np.nonzero(_template(shape)))
    return len(rows) / TEMPLATE_RADIUS**2, float(columns.mean()), float(rows.mean())
