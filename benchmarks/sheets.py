"""Pictures in a grid, with words below each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

SIDE = 160
LINE = 12
MARGIN = 4
LINES = 6


def tile(picture: Image.Image, words: str, wrong: str = "") -> Image.Image:
    """A picture in a square, with its words below it in black and what is wrong with it in red."""
    canvas = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + LINES * LINE + 3 * MARGIN), "white")
    scale = SIDE / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    corner = (MARGIN + (SIDE - width) // 2, MARGIN + (SIDE - height) // 2)
    canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), corner)
    pen = ImageDraw.Draw(canvas)
    lines = [(line, "black") for line in _wrapped(words, pen)[: LINES - 2]]
    lines += [(line, "red") for line in _wrapped(wrong, pen)]
    for number, (line, color) in enumerate(lines[:LINES]):
        pen.text((MARGIN, SIDE + 2 * MARGIN + number * LINE), line, fill=color)
    return canvas


def grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles of one size in rows, on white."""
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    whole = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for index, one in enumerate(tiles):
        row, column = divmod(index, columns)
        whole.paste(one, (column * width, row * height))
    return whole


def _wrapped(text: str, pen: ImageDraw.ImageDraw) -> list[str]:
    """The text in lines that are as wide as a tile."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) > SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
