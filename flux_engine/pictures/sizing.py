"""The sizes pictures are brought to, and bringing them there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

from PIL import Image

from flux_engine.errors import InvalidRequest, did_you_mean
from flux_engine.pictures.arrays import Size

KONTEXT_SIZES: tuple[tuple[int, int], ...] = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip
"""The (width, height) that FLUX.1 Kontext was trained on."""

_TALL = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024),
)  # fmt: skip
SDXL_BUCKETS: tuple[tuple[int, int], ...] = (*_TALL, (1024, 1024), *((w, h) for h, w in reversed(_TALL)))
"""The (width, height) that SDXL was trained on."""

Resize = Literal["stretch", "cover", "contain", "none"]
RESIZES: tuple[str, ...] = get_args(Resize)


def within(size: Size, limit: int, multiple: int, *, floor: bool = False) -> Size:
    """Scaled down, never up, so that no side is over the limit; each side the nearest multiple, or the one below.

    At least one multiple a side, and at most as many as fit the limit. Half a multiple goes to the even one.
    """
    most = max(*size, limit)
    scaled = [Fraction(side * limit, most) for side in size]
    if floor:
        width, height = (int(side) // multiple for side in scaled)
    else:
        width, height = (min(round(side / multiple), limit // multiple) for side in scaled)
    return max(width, 1) * multiple, max(height, 1) * multiple


def of_area(size: Size, pixels: int, multiple: int) -> Size:
    """About that many pixels in the same aspect, up or down; each side the multiple below, and at least one."""
    width, height = size
    sides = math.isqrt(pixels * width // height), math.isqrt(pixels * height // width)
    return max(sides[0] // multiple, 1) * multiple, max(sides[1] // multiple, 1) * multiple


def nearest_aspect(size: Size, sizes: Sequence[Size]) -> Size:
    """Of a table, the size of the nearest aspect; of equally near ones the largest."""

    def distance(other: Size) -> tuple[Fraction, int]:
        ratio = Fraction(size[0] * other[1], size[1] * other[0])
        return max(ratio, 1 / ratio), -other[0] * other[1]

    return min(sizes, key=distance)


def place(image: Size, size: Size, how: str) -> tuple[tuple[float, float, float, float], tuple[int, int, int, int]]:
    """Which box of a picture (left, upper, right, lower) goes into which box of the size wanted."""
    whole, full = (0.0, 0.0, float(image[0]), float(image[1])), (0, 0, *size)
    if how == "cover":
        scale = max(size[0] / image[0], size[1] / image[1])
        width, height = (min(want / scale, float(side)) for want, side in zip(size, image, strict=True))
        left, upper = (image[0] - width) / 2, (image[1] - height) / 2
        return (left, upper, min(left + width, whole[2]), min(upper + height, whole[3])), full
    if how == "contain":
        scale = min(size[0] / image[0], size[1] / image[1])
        width, height = (min(max(round(side * scale), 1), want) for side, want in zip(image, size, strict=True))
        left, upper = (size[0] - width) // 2, (size[1] - height) // 2
        return whole, (left, upper, left + width, upper + height)
    return whole, full


def fit(
    image: Image.Image,
    size: Size,
    how: str,
    *,
    background: int | tuple[int, ...] | None = None,
    resample: Image.Resampling | None = None,
    field: str | None = None,
) -> Image.Image:
    """A new picture of that size.

    "stretch" changes the aspect; "cover" fills the size and cuts what is over, evenly on both sides; "contain" shows
    the whole picture, on the background (white); "none" takes no other size. A mask ("L") is interpolated linearly,
    anything else by Lanczos, unless `resample` says otherwise. A mask of its picture's aspect stays aligned with it.
    """
    if how not in RESIZES:
        raise InvalidRequest(
            f"resize {how!r} is not one of {', '.join(RESIZES)}{did_you_mean(str(how), RESIZES)}", field=field
        )
    if how == "none" and image.size != size:
        raise InvalidRequest(
            f"{field or 'the picture'} is {image.width}x{image.height}, and {size[0]}x{size[1]} is wanted: send that "
            "size, or choose how to resize it (stretch, cover or contain)",
            field=field,
        )
    if resample is None:
        resample = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    source, box = place(image.size, size, how)
    resized = image.resize((box[2] - box[0], box[3] - box[1]), resample, source)
    if resized.size == size:
        return resized
    if background is None:
        background = (255,) * len(image.getbands())
    canvas = Image.new(image.mode, size, background)
    canvas.paste(resized, box)
    return canvas
