"""Read a picture of the drawn world back, and say which attributes of a scene it shows. Version 1, frozen.

Geometry and colour only, nothing learned. The background is the simplest of the world's that explains the picture's
border. What differs from it are the objects. An object's shape is the one whose drawn silhouette, moved and scaled,
covers it best; its fill and its outline are the two colours with which that drawing comes nearest to the picture.

`read` is told nothing about what to expect; `judge` compares what it read with a scene.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image
from scipy import ndimage

from benchmarks import silhouettes, world
from benchmarks.world import Ground, Scene, Thing

VERSION = 1
SIDE = 128
"""Pictures are read with their shorter side at this many pixels."""
MAX_STRETCH = 4
"""A side longer than this many shorter ones is squeezed, so that no picture takes long."""

NOTICEABLE = world.MIN_CONTRAST / 2
"""RGB distance from which a pixel is not the background, and two colours are not the same."""
MAX_COLOR_DISTANCE = 70.0
"""RGB distance beyond which a colour is none of the world's."""
MIN_OVERLAP = 0.86
"""Intersection over union below which an object is no shape of the world."""
MIN_OVERLAP_THIN = 0.80
"""The same for shapes with arms, of which blurred edges leave less. Drawn pictures stay above both under blur, JPEG
and noise, but for 2 in 1,000."""
THIN = ("star", "cross", world.MARKED_SHAPE)
SURE = 0.92
"""Intersection over union below which an object is looked at again."""
MIN_AREA = 0.003 * SIDE**2
"""Area below which something is a speck and no object, in pixels."""
MAX_OBJECTS = 6
"""Most objects that are looked at, the largest ones."""
SIZE_TOLERANCE = 0.05
"""How far a radius may be from its size, as a fraction of the shorter side."""
MIN_APART = 0.15
"""How far two centres are apart along the axis of their relation, at least, as a fraction of the shorter side."""

RING = 2
"""Width of the border from which the background is read, in pixels."""
RING_KEPT = 0.7
"""Share of each side of the border that has to fit: an object may reach into the rest."""
EDGE = 3
"""Pixels by which the edge of a stripe may be blurred or out of place."""
SLOPE = 0.1
"""Share of its way by which a gradient may run ahead or behind."""


@dataclass(frozen=True)
class Found:
    """An object that a picture shows; an empty string for what could not be told."""

    shape: str = ""
    color: str = ""
    size: str = ""
    place: str = ""
    outline: str = ""
    """Empty for none; "?" for one in no colour of the world."""
    center: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.0
    """As a fraction of the shorter side, like the centre; 0 for an object that is not there."""
    overlap: float = 0.0
    """Intersection over union of the object and its best shape."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    ground: Ground
    objects: tuple[Found, ...]
    """The largest first."""


@dataclass(frozen=True)
class _Pattern:
    """How the second colour of a background comes in along an axis."""

    kind: str
    axis: str
    share: np.ndarray
    """Of the second colour, at every pixel that is asked about."""
    low: np.ndarray
    high: np.ndarray
    """The share may lie between these two: they differ where an edge is blurred or a gradient uneven."""


@dataclass(frozen=True)
class _Backdrop:
    """A background as it is seen in a picture."""

    pattern: _Pattern
    first: np.ndarray
    second: np.ndarray

    def drawn(self) -> np.ndarray:
        """Its colours, to be broadcast over the picture."""
        return self.first + self.pattern.share[..., None] * (self.second - self.first)

    def distance(self, pixels: np.ndarray) -> np.ndarray:
        """RGB distance of every pixel to the nearest mixture of the two colours that may be where it is."""
        span, off = self.second - self.first, pixels - self.first
        length = float(span @ span)
        if length == 0:
            return np.linalg.norm(off, axis=-1)
        along = off @ span
        share = np.clip(along / length, self.pattern.low, self.pattern.high)
        squares = np.einsum("...c,...c->...", off, off) - 2 * share * along + share**2 * length
        return np.sqrt(np.maximum(squares, 0))


def read(picture: Image.Image, *, also: tuple[str, ...] = ()) -> Reading:
    """Read one picture. `also` are shapes that it may show beside the world's own: what a LoRA has taught."""
    pixels = _pixels(picture)
    backdrop = _backdrop(pixels)
    pattern = backdrop.pattern
    second = "" if pattern.kind == "plain" else _name(backdrop.second)
    behind = np.broadcast_to(backdrop.drawn(), pixels.shape)
    found = tuple(_object(pixels, behind, mask, corner, also) for mask, corner in _blobs(pixels, backdrop))
    return Reading(Ground(pattern.kind, _name(backdrop.first), second, pattern.axis), found)


def judge(picture: Image.Image, scene: Scene, *, also: tuple[str, ...] = ()) -> dict[str, bool]:
    """Attribute -> whether the picture shows what the scene says; what it leaves open is not judged. `also` as in
    `read`."""
    reading = read(picture, also=also)
    things = scene.things
    candidates = list(permutations((*reading.objects, *[Found()] * len(things)), len(things)))
    likeness = [_likeness(things, candidate) for candidate in candidates]
    best = max(likeness)
    matches = [candidate for candidate, like in zip(candidates, likeness, strict=True) if like == best]
    pairs = list(zip(things, matches[0], strict=True))

    verdict = {"count": len(reading.objects) == len(things)}
    for name in ("shape", "color", "size", "place", "outline"):
        if name == "outline" or any(getattr(thing, name) for thing in things):
            verdict[name] = all(_shows(found, thing, name) for thing, found in pairs)
    if scene.relation:
        # Objects that are as said, but that the words do not tell apart, may change places; wrong objects may not.
        enough = any if best[0] == 2 * len(things) else all
        verdict["relation"] = enough(_related(match, scene.relation) for match in matches)
    if scene.ground.kind != "plain" or scene.ground.color:
        verdict["background"] = _same_ground(scene.ground, reading.ground)
    return verdict


def _shows(found: Found, thing: Thing, name: str) -> bool:
    """Whether an object is there and has an attribute as it is said; an outline is always said."""
    said = getattr(thing, name)
    return found.radius > 0 and (getattr(found, name) == said or (name != "outline" and not said))


def _likeness(things: tuple[Thing, ...], candidate: tuple[Found, ...]) -> tuple[int, int]:
    """How well objects explain a scene's things: by shape and colour, then by size; never by their relation."""
    pairs = list(zip(candidate, things, strict=True))
    kinds = sum(_shows(*pair, name) for pair in pairs for name in ("shape", "color"))
    return kinds, sum(_shows(*pair, "size") for pair in pairs)


def _related(pair: tuple[Found, ...], relation: str) -> bool:
    """Whether the first object lies where the relation says, clearly and mainly along its axis."""
    between = np.subtract(pair[0].center, pair[1].center)
    direction = np.array(world.RELATIONS[relation])
    along, across = float(between @ direction), float(np.abs(between) @ (1 - np.abs(direction)))
    return all(found.radius > 0 for found in pair) and along >= max(MIN_APART, 1.5 * across)


def _same_ground(said: Ground, seen: Ground) -> bool:
    """Whether everything that is said about a background is seen; either stripe may come first."""
    orders = [(seen.color, seen.second)]
    if seen.kind == "striped":
        orders.append((seen.second, seen.color))
    colors = any(said.color in ("", one) and said.second in ("", other) for one, other in orders)
    return said.kind == seen.kind and said.axis in ("", seen.axis) and colors


def _pixels(picture: Image.Image) -> np.ndarray:
    """The picture at working size, (height, width, 3)."""
    short = min(picture.size)
    width, height = (min(round(side * SIDE / short), MAX_STRETCH * SIDE) for side in picture.size)
    resampling = Image.Resampling.BOX if short >= SIDE else Image.Resampling.BICUBIC
    return np.asarray(picture.convert("RGB").resize((width, height), resampling), np.float32)


def _name(color: np.ndarray) -> str:
    """The nearest of the world's colours; none if that is far."""
    distances = np.linalg.norm(np.array(list(world.COLORS.values())) - color, axis=1)
    best = int(distances.argmin())
    return list(world.COLORS)[best] if distances[best] <= MAX_COLOR_DISTANCE else ""


# The background


def _backdrop(pixels: np.ndarray) -> _Backdrop:
    """The pattern that explains the border best, with its two colours; a plain one where that does nearly as well."""
    sides, patterns = _patterns(pixels.shape[1], pixels.shape[0])
    border, sides = pixels[sides >= 0], sides[sides >= 0]
    fits: list[tuple[float, _Backdrop]] = []
    for pattern, on_border in patterns:
        first, second = _ends(border, on_border.share) if pattern.kind == "gradient" else _medians(border, on_border)
        if pattern.kind == "plain" or np.linalg.norm(second - first) >= NOTICEABLE:
            distance = _Backdrop(on_border, first, second).distance(border)
            fits.append((_misfit(distance, sides), _Backdrop(pattern, first, second)))
    plain, best = fits[0], min(fits, key=lambda fit: fit[0])
    return plain[1] if plain[0] <= 1.2 * best[0] + 2 else best[1]


@lru_cache(maxsize=64)
def _patterns(width: int, height: int) -> tuple[np.ndarray, list[tuple[_Pattern, _Pattern]]]:
    """The side (0 to 3) that each pixel of the border is on, -1 inside; and every pattern, plain first, twice: along
    its axis, and at the pixels of the border."""
    sides = np.full((height, width), -1)
    sides[:RING], sides[-RING:], sides[:, :RING], sides[:, -RING:] = 0, 1, 2, 3
    patterns: list[tuple[_Pattern, _Pattern]] = []
    for kind in world.GROUNDS:
        for axis in world.AXES if kind != "plain" else ("",):
            share = _share(kind, axis, width, height)
            if kind == "gradient":
                low, high = np.maximum(share - SLOPE, 0), np.minimum(share + SLOPE, 1)
            else:
                low, high = ndimage.minimum_filter(share, 2 * EDGE + 1), ndimage.maximum_filter(share, 2 * EDGE + 1)
            whole = _Pattern(kind, axis, share, low, high)
            lines, on_border = (
                replace(whole, share=share[part], low=low[part], high=high[part])
                for part in (np.s_[:1] if axis == "x" else np.s_[:, :1], sides >= 0)
            )
            patterns.append((lines, on_border))
    return sides, patterns


def _share(kind: str, axis: str, width: int, height: int) -> np.ndarray:
    """The share of the second colour, read off a background drawn from black to white."""
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    drawn = np.asarray(world.paint_ground(Ground(kind, "black", "white", axis), width, height), np.float32)
    black, white = world.COLORS["black"][0], world.COLORS["white"][0]
    return (drawn[..., 0] - black) / (white - black)


def _medians(border: np.ndarray, pattern: _Pattern) -> tuple[np.ndarray, np.ndarray]:
    """The colours of a pattern that mixes none, away from where they meet."""
    first = np.median(border[pattern.high == 0], axis=0)
    return first, np.median(border[pattern.low == 1], axis=0) if pattern.kind != "plain" else first


def _ends(border: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a gradient: a line through the colours, fitted again and again with less weight on what it misses."""
    basis = np.stack([1 - share, share], axis=1)
    weight = np.ones(len(border), np.float32)
    ends = np.zeros((2, 3), np.float32)
    for _ in range(8):
        weighted = (basis * weight[:, None]).T
        ends = np.linalg.solve(weighted @ basis, weighted @ border)
        missed = np.linalg.norm(border - basis @ ends, axis=1)
        weight = 1 / (1 + (missed / max(10.0, float(np.median(missed)))) ** 2)
    return ends[0], ends[1]


def _misfit(distance: np.ndarray, sides: np.ndarray) -> float:
    """How badly a background fits the border: every side counts alike, and on each an object may cover a part."""
    squares: list[float] = []
    for side in range(4):
        ordered = np.sort(distance[sides == side])
        squares.append(float(np.mean(ordered[: int(RING_KEPT * len(ordered))] ** 2)))
    return float(np.mean(squares)) ** 0.5


# The objects


def _blobs(pixels: np.ndarray, backdrop: _Backdrop) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Mask of each object with room around it, and where its upper left corner (x, y) is; the largest first."""
    pattern = backdrop.pattern
    distance = backdrop.distance(pixels)
    edges = (pattern.low < pattern.high) & (pattern.kind in ("split", "striped"))
    if edges.any():
        # Compression gives the edges between stripes colours that are no mixture; the border shows which.
        ends = (pixels[:RING], pixels[-RING:]) if pattern.axis == "x" else (pixels[:, :RING], pixels[:, -RING:])
        across = 0 if pattern.axis == "x" else 1
        line = np.median(np.concatenate(ends, axis=across), axis=across, keepdims=True)
        distance = np.where(edges, np.minimum(distance, np.linalg.norm(pixels - line, axis=-1)), distance)

    # The edge of an object is where a pixel is half as far from the background as the object next to it.
    seen = distance > NOTICEABLE
    core = ndimage.binary_erosion(seen, np.ones((3, 3), bool), border_value=1)
    level = ndimage.minimum_filter(np.where(core, distance, np.inf), 5)
    mask = seen & (distance > level / 2) & np.isfinite(level)
    if edges.any():
        # An object in a mixture of both colours cannot be seen where they meet: it is there if it is on both sides.
        bridge = np.ones((1, 2 * EDGE + 5) if pattern.axis == "x" else (2 * EDGE + 5, 1), bool)
        mask |= np.asarray(ndimage.binary_closing(mask, bridge), bool) & edges
    mask = _without_holes(mask)

    labels = _label(mask)
    areas = np.bincount(labels.ravel())
    thick = np.unique(labels[np.asarray(ndimage.binary_erosion(mask, np.ones((5, 5), bool), border_value=1), bool)])
    order = [int(label) for label in np.argsort(-areas, kind="stable") if label in thick and areas[label] >= MIN_AREA]
    boxes = ndimage.find_objects(labels)
    for label in [label for label in order if label > 0][:MAX_OBJECTS]:
        rows, columns = boxes[label - 1]
        room = 8 + max(rows.stop - rows.start, columns.stop - columns.start) // 5
        top, left = max(rows.start - room, 0), max(columns.start - room, 0)
        yield labels[top : rows.stop + room, left : columns.stop + room] == label, (left, top)


def _without_holes(mask: np.ndarray) -> np.ndarray:
    """A mask with everything filled that it encloses."""
    labels = _label(~mask)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return mask | ~np.isin(labels, outside)


def _label(mask: np.ndarray) -> np.ndarray:
    """The number of the connected region that each pixel is in; 0 outside the mask."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    return labels


def _object(
    pixels: np.ndarray, behind: np.ndarray, mask: np.ndarray, corner: tuple[int, int], also: tuple[str, ...]
) -> Found:
    """What an object is, from its mask and where that lies."""
    left, top = corner
    patch, patch_behind = (each[top : top + mask.shape[0], left : left + mask.shape[1]] for each in (pixels, behind))
    fit = silhouettes.fit(mask, also)
    paint = silhouettes.paint(patch, patch_behind, fit, NOTICEABLE)
    if fit.overlap < SURE:
        # Look again, now that its colours are known: it is what is nearer to them than to the background.
        nearer = paint.distance(patch) < np.linalg.norm(patch - patch_behind, axis=-1)
        sharper = _without_holes(nearer & ndimage.binary_dilation(mask, iterations=EDGE))
        again = silhouettes.fit(sharper, also) if sharper.any() else fit
        if again.overlap > fit.overlap:
            fit, paint = again, silhouettes.paint(patch, patch_behind, again, NOTICEABLE)

    radius = paint.radius / SIDE
    center = ((left + fit.x) / SIDE, (top + fit.y) / SIDE)
    fill, outline = _name(paint.fill), ""
    if paint.outline is not None and _name(paint.outline) != fill:
        outline = _name(paint.outline) or "?"
    size = min(world.SIZES, key=lambda name: abs(world.SIZES[name] - radius))
    enough = MIN_OVERLAP_THIN if fit.shape in THIN else MIN_OVERLAP
    return Found(
        shape=fit.shape if fit.overlap >= enough else "",
        color=fill,
        size=size if abs(world.SIZES[size] - radius) <= SIZE_TOLERANCE else "",
        place=_place(center, radius, pixels.shape[1] / SIDE, pixels.shape[0] / SIDE),
        outline=outline,
        center=center,
        radius=radius,
        overlap=fit.overlap,
    )


def _place(center: tuple[float, float], radius: float, width: float, height: float) -> str:
    """The place in whose direction the centre lies, at least half as far out as an object of this radius is put."""
    steps = [
        (where - full / 2) / (max(world.offset(radius), 0.05) + (full - 1) / 2)
        for where, full in zip(center, (width, height), strict=True)
    ]
    direction = tuple(int(np.clip(round(step), -1, 1)) for step in steps)
    return next(name for name, value in world.PLACES.items() if value == direction)
