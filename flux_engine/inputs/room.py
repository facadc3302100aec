"""Outpainting: a picture with room around it, and the room's mask. After this it is inpainting."""

from __future__ import annotations

from math import ceil

import numpy as np
from PIL import Image

from flux_engine.checks import integer
from flux_engine.errors import InvalidRequest
from flux_engine.sizes import SizeTable

OVERLAP = 8
"""Pixels of the picture, along each side with room, that are repainted too, so that the room goes on from it."""


def with_room(image: Image.Image, room: object, sizes: SizeTable, notes: list[str]) -> tuple[Image.Image, Image.Image]:
    """RGB -> canvas, RGB, and mask, L, both of a size that the model draws. The picture is scaled down if it has to be,
    never stretched. In the room its edges go on, so that an autoencoder, which sees both, keeps the picture as it is.

    `room` is pixels of the picture (left, top, right, bottom), or the size to come to (width, height), with the picture
    in the middle. What is drawn otherwise than asked for is added to `notes`. Raises InvalidRequest.
    """
    left, top, right, bottom = _margins(image.size, room, sizes)
    wanted = image.width + left + right, image.height + top + bottom
    shrink = min(1.0, sizes.max_side / max(wanted), (sizes.max_pixels / (wanted[0] * wanted[1])) ** 0.5)
    sent = image.size
    if shrink < 1:
        shrink *= 1 - 2 / sizes.max_side  # for the margins, which are rounded up
        image = image.resize(
            (max(1, int(image.width * shrink)), max(1, int(image.height * shrink))), Image.Resampling.LANCZOS
        )
    left, width = _along(image.width, ceil(left * shrink), ceil(right * shrink), sizes)
    top, height = _along(image.height, ceil(top * shrink), ceil(bottom * shrink), sizes)
    if shrink < 1:
        notes.append(
            f"image {sent[0]}x{sent[1]} scaled to {image.width}x{image.height}: with its room it is "
            f"{wanted[0]}x{wanted[1]}, larger than the model draws"
        )
    elif (width, height) != wanted:
        notes.append(f"outpaint to {wanted[0]}x{wanted[1]} enlarged to {width}x{height}, which the model draws")
    around = (top, height - top - image.height), (left, width - left - image.width), (0, 0)
    canvas = Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))
    mask = Image.new("L", canvas.size, 255)
    kept = (
        left + (OVERLAP if left else 0),
        top + (OVERLAP if top else 0),
        left + image.width - (OVERLAP if left + image.width < width else 0),
        top + image.height - (OVERLAP if top + image.height < height else 0),
    )
    if kept[0] < kept[2] and kept[1] < kept[3]:
        mask.paste(0, kept)
    return canvas, mask


def _margins(size: tuple[int, int], room: object, sizes: SizeTable) -> tuple[int, int, int, int]:
    if not isinstance(room, (tuple, list)) or len(room) not in (2, 4):
        said = f"has {len(room)} numbers" if isinstance(room, (tuple, list)) else f"is a {type(room).__name__}"
        raise InvalidRequest(
            f"outpaint {said}: say (left, top, right, bottom), or (width, height) to come to", field="outpaint"
        )
    sides = [integer("outpaint", side, 0, 16 * sizes.max_side) for side in room]
    if len(sides) == 2:
        extra = [there - here for there, here in zip(sides, size, strict=True)]
        if min(extra) < 0:
            raise InvalidRequest(
                f"outpaint to {sides[0]}x{sides[1]}: the picture is larger, {size[0]}x{size[1]}", field="outpaint"
            )
        sides = [extra[0] // 2, extra[1] // 2, extra[0] - extra[0] // 2, extra[1] - extra[1] // 2]
    if not any(sides):
        raise InvalidRequest(f"outpaint {tuple(room)} leaves no room to paint", field="outpaint")
    return sides[0], sides[1], sides[2], sides[3]


def _along(side: int, before: int, after: int, sizes: SizeTable) -> tuple[int, int]:
    """Where the picture begins along a side of the canvas, and how long that is: a multiple, and no less than the model
    draws. What is added for that goes where there is room already."""
    least = max(before + side + after, sizes.min_side)
    length = -(-least // sizes.multiple) * sizes.multiple
    return (length - side - after if before and not after else before), length
