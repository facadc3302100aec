"""The size of a job that says none, after the picture that it brings."""

from __future__ import annotations

from flux_engine import pictures
from flux_engine.errors import InvalidRequest
from flux_engine.sizes import MATCH_INPUT, SizeTable

Size = tuple[int, int]
"""(width, height)."""


def following(picture: Size, sizes: SizeTable, megapixels: str | None) -> Size:
    """The size of a job that follows a picture's. `megapixels` is one of the table's, or "match_input".

    Raises InvalidRequest for a picture of a shape that the model cannot draw.
    """
    limit = sizes.follow_limit // sizes.divisor
    if megapixels is None and sizes.follow == "preferred":
        return pictures.nearest_aspect(picture, preferred(sizes))
    shorter: float = min(picture) * limit / max(*picture, limit)  # before it is put on the grid
    if isinstance(megapixels, str) and megapixels == MATCH_INPUT:
        size = pictures.within(picture, limit, 2 * sizes.multiple, floor=True)
    elif megapixels is not None or sizes.follow == "area":
        megapixels = sizes.classes[0] if megapixels is None else megapixels
        sizes.named("1:1", megapixels)  # refuses what is not in the table
        pixels = int(float(megapixels) * 1024 * 1024) // sizes.divisor**2
        size = pictures.of_area(picture, pixels, 2 * sizes.multiple)
        shorter = min(size)
    else:
        size = pictures.within(picture, limit, sizes.multiple)
    if shorter < sizes.min_side:
        multiple, grown = sizes.multiple, sizes.min_side / min(picture)
        size = tuple(max(sizes.min_side, round(side * grown / multiple) * multiple) for side in picture)
    if max(size) > sizes.max_side:
        raise InvalidRequest(
            f"a picture of {picture[0]}x{picture[1]} is too narrow: at {size[0]}x{size[1]} a side is over "
            f"{sizes.max_side}; cut it, or give width and height",
            field="image",
        )
    return size[0], size[1]


def divided(size: Size, sizes: SizeTable) -> Size:
    """A published size as a small model has it."""
    width, height = (int(side / sizes.divisor / sizes.multiple + 0.5) * sizes.multiple for side in size)
    return width, height


def preferred(sizes: SizeTable) -> list[Size]:
    """The sizes that FLUX.1 Kontext was taught pictures in, as this model has them."""
    return [divided(one, sizes) for one in pictures.KONTEXT_SIZES]
