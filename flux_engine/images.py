"""Pictures at the edge of the library: tensors to PIL, files with their parameters inside."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from flux_engine.files import ImageFormat

EXIF_SOFTWARE = 0x0131
EXIF_IFD = 0x8769
EXIF_USER_COMMENT = 0x9286
EXIF_LIMIT = 60_000
"""Bytes of text an EXIF block takes: JPEG allows 65,533 for the whole block. What is longer is cut."""


def to_uint8(picture: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, H, W) in about [-1, 1] -> (H, W, 3) uint8, clamped and rounded."""
    scaled = ((picture.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.byte().permute(1, 2, 0).cpu().numpy()


def to_pil(picture: Tensor) -> Image.Image:
    """(3, H, W) in about [-1, 1] -> PIL."""
    return Image.fromarray(to_uint8(picture))


def encode(
    image: Image.Image,
    format: ImageFormat,
    *,
    quality: int = 95,
    parameters: str | None = None,
) -> bytes:
    """A picture as file content. `quality` (0 to 100) does not matter for png.

    `parameters` is text to carry along: PNG's `parameters` chunk, as AUTOMATIC1111 writes it, or EXIF's UserComment.
    """
    buffer = io.BytesIO()
    if format == "png":
        info = PngImagePlugin.PngInfo()
        if parameters:
            info.add_text("parameters", parameters)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        image.save(
            buffer,
            {"jpg": "JPEG", "webp": "WEBP"}[format],
            quality=quality,
            optimize=True,
            exif=_exif(parameters) if parameters else b"",
        )
    return buffer.getvalue()


def _exif(parameters: str) -> bytes:
    exif = Image.Exif()
    exif[EXIF_SOFTWARE] = "flux-engine"
    text = parameters.encode("utf-16-be")[:EXIF_LIMIT]
    exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\0" + text
    return exif.tobytes()


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """The text a picture of ours carries, or None."""
    with Image.open(path) as image:
        text: Mapping[str | tuple[int, int], Any] = image.info
        if "parameters" in text:
            return str(text["parameters"])
        comment = image.getexif().get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be", errors="ignore")
    return None


def contact_sheet(images: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures side by side on white, each in a cell that the largest fits."""
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + gap) - gap, rows * (height + gap) - gap),
        (255, 255, 255),
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet
